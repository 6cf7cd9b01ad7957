"""One model of a pair, and how probable it finds what it may be made to say.

1. A continuation's tokens are those that follow when context and continuation are encoded together; spaces
   that end the context are moved to the continuation first.
2. With shared-vocabulary masking only tokens that all models of the pair have may be said. A text whose own
   tokens are not all shared is spelled with the tokens of the other tokenizer; if these are not all shared
   either, it cannot be scored.
3. A context longer than the model's is not cut: there is no score.

Source: rule 1 is that of EleutherAI/lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechdiff.errors import PairError
from mechdiff.functional.scoring import DELIMITER
from mechdiff.interventions.generation import generate, stop_tokens
from mechdiff.interventions.likelihood import Likelihoods, Reader, continuation_logprobs, many_logprobs
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.pairs.alignment import PREFIX, SUFFIX, encode
from mechdiff.pairs.fairness import lost_mass
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.pairs.tokenizers import SharedVocab

Ids = list[int]
Answers = list[str | None]


@dataclass(frozen=True)
class Spoken:
    """Log-probabilities of continuations of one context, in nats; None where there is no score.

    Attributes:
        free: Among all tokens.
        masked: Among shared tokens, renormalised at each step.
        new_mass: Probability of tokens outside the shared ones right after the context.
    """

    free: list[float | None]
    masked: list[float | None]
    new_mass: float | None


@dataclass(frozen=True)
class Voice:
    """A model that is asked to say things.

    Attributes:
        loaded: The model.
        shared_ids: Ids of the tokens that all models of the pair have, `(size,)`.
        partner: The other tokenizer.
        translate: Shared ids of the partner, each with the id of the same token here.
    """

    loaded: LoadedModel
    shared_ids: Tensor
    partner: PreTrainedTokenizerBase
    translate: dict[int, int]

    @cached_property
    def reader(self) -> Reader:
        """Runs contexts, each as far as it differs from the one before."""
        return Reader(SuffixEngine(self.loaded.model))

    @cached_property
    def shared(self) -> frozenset[int]:
        """The shared ids as a set."""
        return frozenset(self.shared_ids.tolist())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own tokenizer."""
        return self.loaded.tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens that the model takes."""
        return self.loaded.context_length

    def masked(self, own: Ids, partners: Ids) -> Ids | None:
        """Spell a text in shared tokens.

        Args:
            own: The text in its own tokens.
            partners: The text in the partner's tokens.

        Returns:
            Its own ids, or None if neither will do.
        """
        if self.shared.issuperset(own):
            return own
        if all(i in self.translate for i in partners):
            return [self.translate[i] for i in partners]
        return None

    def score(self, context: str, continuations: Sequence[str]) -> Spoken:
        """Score continuations of a plain text as written, including any space at their start.

        Args:
            context: Text before; empty for the start of a text.
            continuations: What may follow.
        """
        return self.score_ids(*self._spelled(context, continuations))

    def score_all(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[Spoken]:
        """Score continuations of several plain texts, which are run together; see `score`.

        Args:
            asked: Texts before, each with what may follow.
        """
        spelled = [self._spelled(context, texts) for context, texts in asked]
        wanted = [list(dict.fromkeys(tuple(i) for i in (*own, *masked) if i)) for _, own, masked in spelled]
        fit = [
            n
            for n, texts in enumerate(wanted)
            if texts and len(spelled[n][0]) + max(map(len, texts)) - 1 <= self.context_length
        ]
        scored = many_logprobs(self.reader, [(spelled[n][0], wanted[n]) for n in fit], self.shared_ids)
        found = dict(zip(fit, scored, strict=True))
        return [self._spoken(*spelled[n][1:], wanted[n], found.get(n)) for n in range(len(asked))]

    def score_answers(self, message: str, answers: Sequence[str]) -> Spoken:
        """Score how an answer to a user's message may begin, after the chat template if there is one."""
        context = encode(self.tokenizer, message).input_ids
        own, partners = (
            [tokenizer(text, add_special_tokens=False).input_ids for text in answers]
            for tokenizer in (self.tokenizer, self.partner)
        )
        masked = [self.masked(ids, theirs) for ids, theirs in zip(own, partners, strict=True)]
        return self.score_ids(context, own, masked)

    def score_message(self, message: str) -> Spoken:
        """Score a user's message itself, after what the chat template puts before it."""
        (before, own), (_, partners) = (_message(t, message) for t in (self.tokenizer, self.partner))
        context = before or [start_token(self.tokenizer)]
        return self.score_ids(context, [own], [self.masked(own, partners)])

    def score_ids(self, context: Ids, own: Sequence[Ids], masked: Sequence[Ids | None]) -> Spoken:
        """Score continuations in ids; `masked` holds the same texts in shared tokens."""
        texts = list(dict.fromkeys(tuple(ids) for ids in (*own, *masked) if ids))
        longest = max((len(text) for text in texts), default=0)
        if not texts or len(context) + longest - 1 > self.context_length:
            return self._spoken(own, masked, texts, None)
        found = continuation_logprobs(self.reader, context, texts, self.shared_ids)
        return self._spoken(own, masked, texts, found)

    def _spelled(self, context: str, continuations: Sequence[str]) -> tuple[Ids, list[Ids], list[Ids | None]]:
        """Return the ids of a context and of what may follow, as it is and in shared tokens."""
        pairs = [encode_pair(self.tokenizer, context, text) for text in continuations]
        partners = [encode_pair(self.partner, context, text)[1] for text in continuations]
        masked = [self.masked(own, theirs) for (_, own), theirs in zip(pairs, partners, strict=True)]
        return pairs[0][0], [own for _, own in pairs], masked

    def _spoken(
        self,
        own: Sequence[Ids],
        masked: Sequence[Ids | None],
        texts: Sequence[Sequence[int]],
        found: Likelihoods | None,
    ) -> Spoken:
        """Say how probable each continuation is, from the scores of all different ones."""
        if found is None:
            return Spoken([None] * len(own), [None] * len(own), None)
        assert found.within is not None
        row = {tuple(text): number for number, text in enumerate(texts)}
        free, within = found.free.tolist(), found.within.tolist()
        return Spoken(
            [free[row[tuple(ids)]] if ids else None for ids in own],
            [within[row[tuple(ids)]] if ids else None for ids in masked],
            lost_mass(found.next_logits, self.shared_ids).item(),
        )

    def answer(self, contexts: Sequence[Ids], max_new_tokens: int) -> tuple[Answers, Answers]:
        """Answer greedily; None where the context leaves no room.

        Args:
            contexts: Token ids up to the answer.
            max_new_tokens: Longest answer in tokens.

        Returns:
            Answers among all tokens, and among the shared ones.
        """
        model, stops = self.loaded.model, stop_tokens(self.loaded.model, self.tokenizer.eos_token_id)
        fit = [i for i, ids in enumerate(contexts) if len(ids) + max_new_tokens <= self.context_length]
        free = dict(zip(fit, generate(model, [contexts[i] for i in fit], max_new_tokens, stops), strict=True))
        # Where nothing but shared tokens was chosen, masking the others changes nothing.
        again = [i for i in fit if not self.shared.issuperset(free[i])]
        redone = generate(model, [contexts[i] for i in again], max_new_tokens, stops, self.shared_ids)
        masked = free | dict(zip(again, redone, strict=True))

        def read(found: dict[int, Ids]) -> Answers:
            texts = {i: str(self.tokenizer.decode(ids, skip_special_tokens=True)) for i, ids in found.items()}
            return [texts[i].strip() if i in texts else None for i in range(len(contexts))]

        return read(free), read(masked)

    def answer_messages(self, messages: Sequence[str], max_new_tokens: int) -> tuple[Answers, Answers]:
        """Answer users' messages; see `answer`."""
        return self.answer([encode(self.tokenizer, m).input_ids for m in messages], max_new_tokens)

    def continue_texts(self, texts: Sequence[str], max_new_tokens: int) -> tuple[Answers, Answers]:
        """Continue plain texts, without a chat template; see `answer`."""
        return self.answer([encode_text(self.tokenizer, text) for text in texts], max_new_tokens)


def voices(pair: LoadedPair) -> dict[str, Voice]:
    """Return the models of a pair by role, with the tokens that all of them have."""
    base, tuned, reference = pair.base, pair.tuned, pair.reference
    base_ids, tuned_ids = pair.shared.base_ids, pair.shared.tuned_ids
    rows: dict[str, tuple[LoadedModel, Tensor]] = {}
    if reference is not None:
        third = SharedVocab(base.tokenizer, reference.tokenizer)
        of_base = dict(zip(third.base_ids.tolist(), third.tuned_ids.tolist(), strict=True))
        kept = torch.tensor([i in of_base for i in base_ids.tolist()], dtype=torch.bool)
        base_ids, tuned_ids = base_ids[kept], tuned_ids[kept]
        rows["reference"] = (
            reference,
            torch.tensor([of_base[i] for i in base_ids.tolist()], dtype=torch.long),
        )
    rows = {"base": (base, base_ids), "tuned": (tuned, tuned_ids), **rows}
    found = {}
    for role, (loaded, ids) in rows.items():
        partner, partner_ids = rows["tuned" if role == "base" else "base"]
        translate = dict(zip(partner_ids.tolist(), ids.tolist(), strict=True))
        found[role] = Voice(loaded, ids, partner.tokenizer, translate)
    return found


def logprob_correct(
    voice: Voice, question_text: str, correct_option_text: str, masking: bool = False
) -> float | None:
    """Return log P(correct option | question) in nats, or None if it cannot be scored.

    Args:
        voice: The model.
        question_text: Text up to the answer, such as `question_prompt` writes it.
        correct_option_text: The option, without the space before it.
        masking: Whether only shared tokens count.
    """
    spoken = voice.score(question_text, [DELIMITER + correct_option_text])
    return (spoken.masked if masking else spoken.free)[0]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Encode a context and what follows it.

    Args:
        tokenizer: Tokenizer of the model that scores.
        context: Text before; empty for the start of a text.
        continuation: Text to score.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        start, ids = start_token(tokenizer), tokenizer.encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)
    before = encode_text(tokenizer, stripped)
    return before, encode_text(tokenizer, stripped + continuation)[len(before) :]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """Encode a plain text with the special tokens that the tokenizer adds, unless it starts with one."""
    written = text.startswith(str(tokenizer.decode([start_token(tokenizer)])))
    ids: Ids = tokenizer.encode(text, **({"add_special_tokens": False} if written else {}))
    return ids


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands before a text without context: the begin token, or else the end token.

    Raises:
        PairError: If the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise PairError(
            f"{type(tokenizer).__name__} has neither a begin nor an end token; one is needed (key: pair)"
        )
    return int(start)


def _message(tokenizer: PreTrainedTokenizerBase, message: str) -> tuple[Ids, Ids]:
    """Return the tokens before a user's message, and those that hold a part of it."""
    prompt = encode(tokenizer, message)
    before = len(list(takewhile(lambda region: region == PREFIX, prompt.regions)))
    after = len(list(takewhile(lambda region: region == SUFFIX, prompt.regions[::-1])))
    return prompt.input_ids[:before], prompt.input_ids[before : len(prompt) - after]
