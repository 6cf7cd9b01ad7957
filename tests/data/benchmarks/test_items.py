"""Permuted options, majority letters, seeded samples and folds."""

from collections import Counter
from dataclasses import replace

import pytest

from mechdiff.data.benchmarks.items import (
    Item,
    fold,
    majority_letter,
    permute_options,
    sample,
)
from mechdiff.data.benchmarks.registry import load_benchmark
from mechdiff.errors import PromptError
from tests.data.benchmarks.rows import SHIPPED, shipped


def test_permutation_moves_gold_unknown_and_biased_along():
    for name in ("kk_mc", "bbq"):
        for item in shipped(name).items:
            moved = permute_options(item, seed=3)
            assert moved == permute_options(item, seed=3)
            assert sorted(moved.options) == sorted(item.options)
            assert moved.options[moved.gold] == item.options[item.gold]
            assert [item.options[i] for i in moved.meta["order"]] == list(moved.options)
            for key in ("unknown", "biased"):
                if key in item.meta:
                    assert moved.options[moved.meta[key]] == item.options[item.meta[key]]
    orders = [permute_options(i, seed=s).meta["order"] for s in (1, 2) for i in shipped("kk_mc").items]
    assert len(set(orders)) > 20


def test_majority_letter():
    items = [Item(str(i), "mc", "Q", options=tuple("abcd"), gold=g) for i, g in enumerate([0, 0, 0, 2])]
    assert majority_letter(items) == ("A", 0.75, {"A": 3, "B": 0, "C": 1, "D": 0})
    with pytest.raises(PromptError, match="no item has a gold option"):
        majority_letter(shipped("roles").items)


def test_samples_are_seeded_ordered_and_bounded():
    items = shipped("gsm8k").items
    chosen = load_benchmark("gsm8k", str(SHIPPED["gsm8k"]), limit=7).items
    assert list(chosen) == sample(items, 7, name="gsm8k")
    assert [i.id for i in chosen] == sorted(i.id for i in chosen)
    assert sample(items, 7, seed=1) != sample(items, 7, seed=2)
    assert sample(items, 1000) == list(items)
    with pytest.raises(PromptError, match=r"is 0; allowed: 1 or more \(key: limit\)"):
        sample(items, 0)


def test_folds_depend_on_the_question_alone():
    items = shipped("en_mc").items
    assert set(Counter(fold(i) for i in items)) == set(range(5))
    assert fold(items[0]) == fold(replace(items[0], id="z", question=f"  {items[0].question.upper()}\n"))
