"""Extend a byte-level BPE tokenizer with tokens learned from text, without touching what it already does.

1. Split the text into words as the tokenizer does, and encode each word with its present merges.
2. Join the most frequent pair of neighbouring tokens, over all words, into a new token; repeat.
3. Append the new tokens and merges to the lists. A merge later in the list has lower priority, so the old
   merges run first and unchanged:
   text in which no new pair occurs (English, here) keeps its ids.

Only pairs of non-ASCII bytes are joined, so that English, digits and code cannot change.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Pair = tuple[str, str]


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], count: int
) -> PreTrainedTokenizerFast:
    """Return a copy of a byte-level BPE tokenizer with ``count`` more tokens.

    Args:
        tokenizer: The tokenizer to extend; left as it is.
        texts: What to learn the tokens from.
        count: Number of new tokens; they get the ids after the present ones.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    first = len(tokenizer)
    for i, (left, right) in enumerate(learn_merges(tokenizer.backend_tokenizer, texts, count)):
        spec["model"]["vocab"][left + right] = first + i
        spec["model"]["merges"].append([left, right])
    kwargs = {
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **tokenizer.special_tokens_map, **kwargs
    )


def learn_merges(tokenizer: Tokenizer, texts: Iterable[str], count: int) -> list[Pair]:
    """Return the ``count`` most useful new merges, in order of priority (ties by spelling)."""
    words = Counter(word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    split = {word: tokenizer.model.tokenize(word) for word in words}
    pieces = {word: [token.value for token in tokens] for word, tokens in split.items()}
    vocabulary, merges = set(tokenizer.get_vocab()), list[Pair]()
    while len(merges) < count:
        pairs = Counter[Pair]()
        for word, tokens in pieces.items():
            for pair in pairwise(tokens):
                pairs[pair] += words[word]
        allowed = {p: n for p, n in pairs.items() if p[0] + p[1] not in vocabulary and not _ascii(p)}
        assert allowed, f"the text gives only {len(merges)} merges, not {count}"
        best = max(allowed, key=lambda p: (allowed[p], p))
        merges.append(best)
        vocabulary.add(best[0] + best[1])
        pieces = {word: _join(tokens, best) for word, tokens in pieces.items()}
    return merges


def _ascii(pair: Pair) -> bool:
    return any(character.isascii() for token in pair for character in token)


def _join(tokens: list[str], pair: Pair) -> list[str]:
    joined, i = list[str](), 0
    while i < len(tokens):
        match = tuple(tokens[i : i + 2]) == pair
        joined.append(tokens[i] + tokens[i + 1] if match else tokens[i])
        i += 2 if match else 1
    return joined
