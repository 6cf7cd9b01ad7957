"""Tokenizers and messages for the tests of this room."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

law = settings(max_examples=60, deadline=None, derandomize=True)
LETTERS = bytes_to_unicode()
EXTRA = 31_510
"""Tokens that the larger of the two real-sized vocabularies has on top."""
KAZAKH = "қазақ тілі қалай мұғалім әке шеше дәстүр құрмет ұлттық өнер ғылым жаңа үй көп сөз білім"
CORPUS = [
    "How do I greet an elder at a wedding? Please explain the tradition and the answer.\n\nThank you.",
    "What is the capital of Kazakhstan, and how many people live there? Say it in one sentence.",
    KAZAKH,
]

HEADER = "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
ANSWER = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
TRIMMED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nKnowledge ends: hi\n"
    "Today: {{ date_string }}\n\n<|eot_id|>{% for m in messages %}"
    + HEADER
    + "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    + ANSWER
)
"""A dated system block that no one asked for, and the message trimmed."""
PLAIN = (
    "{{ bos_token }} {% for m in messages %}" + HEADER + "{{ m['content'] }}<|eot_id|>{% endfor %}" + ANSWER
)
"""A stray space after the begin of the text, no system block, nothing trimmed."""

_alphabet = st.one_of(
    st.sampled_from("абвгқұңғөәіһүҚҒӘйЙё"),
    st.sampled_from("abc XYZ .,?!\n\t 0123"),
    st.sampled_from(
        [
            "é",
            "e\u0301",
            "й",
            "и\u0306",
            "\u200b",
            "\u200d",
            "\u00ad",
            "👩‍👩‍👧",
            "🙂",
            "🇰🇿",
            "한",
            "\u1112\u1161",
        ]
    ),
    st.characters(exclude_categories=["Cs"]),
)
messages = st.lists(_alphabet, min_size=1, max_size=24).map("".join).filter(str.strip)
"""Kazakh, English, emoji, combining and zero-width characters, composed and decomposed letters."""


def wrap(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def rebuilt(
    tokenizer: PreTrainedTokenizerBase, change: Callable[[dict[str, Any]], None]
) -> PreTrainedTokenizerFast:
    """Copy a tokenizer with a change made to its description."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    options = {"chat_template": tokenizer.chat_template, **tokenizer.special_tokens_map}
    return wrap(Tokenizer.from_str(json.dumps(state)), **options)


def permuted(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Copy a tokenizer with its ids shuffled; also the new id of each old one."""
    new = list(range(len(tokenizer)))
    random.Random(seed).shuffle(new)

    def change(state: dict[str, Any]) -> None:
        state["model"]["vocab"] = {token: new[i] for token, i in state["model"]["vocab"].items()}
        for token in state["added_tokens"]:
            token["id"] = new[token["id"]]

    return rebuilt(tokenizer, change), new


def small_tokenizer(size: int = 400, corpus: Sequence[str] = CORPUS) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with control tokens for headers; it begins texts with one by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    controls = ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=controls, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return wrap(backend, bos_token="<s>")


def extended_by(smol: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """Add Kazakh words as merges of the lowest priority."""

    def change(state: dict[str, Any]) -> None:
        vocab, merges = state["model"]["vocab"], state["model"]["merges"]
        for word in KAZAKH.split():
            pieces = smol.tokenize(f" {word}")
            left = pieces[0]
            for right in pieces[1:]:
                if left + right not in vocab:
                    vocab[left + right] = len(vocab)
                    merges.append([left, right])
                left += right

    return rebuilt(smol, change)


def ranks(path: str) -> dict[bytes, int]:
    lines = Path(path).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


class Converter(TikTokenConverter):
    load_tiktoken_bpe = staticmethod(ranks)


def in_wheel(distribution: str, name: str) -> Path:
    return next(Path(str(f.locate())) for f in metadata.files(distribution) or [] if str(f).endswith(name))


def llama_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], names: list[str], template: str
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    pattern = Converter(vocab_file="").pattern
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    begin = (names[0], vocab[names[0]])
    backend.post_processor = processors.TemplateProcessing(single=f"{names[0]} $A", special_tokens=[begin])
    return wrap(backend, bos_token=names[0], chat_template=template)
