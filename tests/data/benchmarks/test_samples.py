"""The samples that ship with the repository."""

import json
import re
from collections import Counter

import pytest

from mechdiff.data.benchmarks.bias import UNKNOWN
from mechdiff.data.benchmarks.items import (
    LETTERS,
    majority_letter,
)
from mechdiff.data.benchmarks.registry import BENCHMARKS, load_benchmarks
from mechdiff.functional.answers import parse_number
from tests.data.benchmarks.rows import SHIPPED, shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_samples_are_large_enough_clean_and_distinct(name):
    data = load_benchmarks({name: str(SHIPPED[name])})[name]
    assert len(data.items) >= 40
    assert not data.dropped
    texts = [" ".join((i.context + " " + i.question).casefold().split()) for i in data.items]
    assert len(set(texts)) == len(texts)
    assert len({i.id for i in data.items}) == len(texts)
    for item in data.items:
        assert item.kind == BENCHMARKS[name].kind
        assert len(set(item.options)) == len(item.options)
        for text in (item.question, item.context, *item.options):
            assert not re.search(r"  |\s$", text), text


def test_kazakh_letters_are_all_cyrillic():
    for item in shipped("kk_mc").items:
        for text in (item.question, *item.options, item.category):
            assert not re.search(r"[A-Za-z]", text), text


@pytest.mark.parametrize("name", ["kk_mc", "en_mc"])
def test_gold_letters_are_balanced_and_gold_is_not_the_longest(name):
    items = shipped(name).items
    counts = majority_letter(items).counts
    assert set(counts.values()) == {len(items) // len(LETTERS)}
    longest = sum(len(i.options[i.gold]) == max(map(len, i.options)) for i in items)
    assert longest / len(items) < 0.5


def test_word_problems_are_right():
    rows = [json.loads(line) for line in SHIPPED["gsm8k"].read_text(encoding="utf-8").splitlines()]
    for row, item in zip(rows, shipped("gsm8k").items, strict=True):
        steps = re.findall(r"<<([-+*/\d]+)=(-?\d+)>>", row["answer"])
        for left, right in steps:
            assert eval(left) == int(right), left
        assert parse_number(item.gold) == int(steps[-1][1])


def test_bias_sample_is_crossed():
    items = shipped("bbq").items
    cells = Counter((i.meta["pair"], i.meta["condition"], i.meta["polarity"]) for i in items)
    assert set(cells.values()) == {1}
    assert len(cells) == len(items)
    assert all(i.meta["biased"] is not None for i in items)
    assert {i.options[i.meta["unknown"]].lower() for i in items} <= UNKNOWN
    assert {i.meta["unknown"] for i in items} == {0, 1, 2}
