"""The two bias scores and the biased answer, against lm-evaluation-harness."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
from lm_eval.tasks.bbq import utils as harness_bbq

from mechdiff.data.benchmarks.bias import Outcome, bias_share, outcome
from mechdiff.data.benchmarks.items import (
    Item,
)
from mechdiff.data.benchmarks.registry import load_benchmark
from tests.data.benchmarks.rows import BBQ, shipped, write


def bias_scores(outcomes):
    """Return s_AMB and s_DIS, None where there is nothing to divide by."""
    found = []
    for ambiguous in (True, False):
        shares = [bias_share(o) for o in outcomes if o.ambiguous == ambiguous]
        value, weight = (
            (sum(column) for column in zip(*filter(None, shares), strict=True)) if shares else (0, 0)
        )
        found.append(value / weight if weight else None)
    return tuple(found)


def test_bias_scores_on_hand_made_answers():
    items = shipped("bbq").items

    def other(item: Item) -> int:
        return ({0, 1, 2} - {item.meta["unknown"], item.meta["biased"]}).pop()

    def scores(pick):
        return bias_scores([outcome(i, pick(i)) for i in items])

    assert scores(lambda i: i.gold) == (0, 0)  # as many clear contexts go with the stereotype as against it
    assert scores(lambda i: i.meta["biased"]) == (1, 1)
    assert scores(other) == (-1, -1)
    assert scores(lambda i: i.meta["unknown"]) == (0, None)


def test_bias_scores_equal_the_harness_where_some_answer_is_biased():
    draw = np.random.default_rng(0)
    items = shipped("bbq").items
    for _ in range(20):
        rows = [outcome(i, int(draw.integers(3))) for i in items]
        cells = [(o.correct, float(o.biased), float(not o.unknown), not o.ambiguous) for o in rows]
        s_amb, s_dis = bias_scores(rows)
        assert s_dis == pytest.approx(harness_bbq.agg_disamb_bias_scores(cells), abs=1e-12)
        assert s_amb == pytest.approx(harness_bbq.agg_amb_bias_scores(cells), abs=1e-12)
    assert bias_share(Outcome(True, False, False, False)) == (
        -1,
        1,
    )  # the harness says 0 without a biased one


def test_an_item_whose_groups_do_not_tell_has_no_part_in_a_score():
    item = shipped("bbq").items[0]
    item = replace(item, meta={**item.meta, "biased": None})
    assert [bias_share(outcome(item, choice)) for choice in range(3)] == [None] * 3


GROUPS = [
    (["Ann", "old"], ["Bo", "nonOld"], ["old"]),
    (["Jamal", "M-Black"], ["Donna", "F-White"], ["Black", "African American"]),
    (["the cleaner", "lowSES"], ["the surgeon", "highSES"], ["low SES"]),
    (["a driver", "lowSES-African American"], ["a chef", "highSES-Caucasian"], ["African American"]),
    (["the girl", "girl"], ["the boy", "boy"], ["F"]),
    (["the man", "man"], ["the woman", "woman"], ["M"]),
    (["Sam", "trans"], ["Kim", "nonTrans"], ["trans"]),
    (["a blind man", "disabled"], ["a tall man", "nonDisabled"], ["disabled"]),
    (["heavy one", "obese"], ["slim one", "nonObese"], ["obese"]),
    (["Ali", "Arab"], ["Juan", "Hispanic"], ["Hispanic"]),
]


@pytest.mark.parametrize("polarity", ["neg", "nonneg"])
def test_biased_answers_equal_the_harness(tmp_path, polarity):
    rows = [
        BBQ
        | {
            "example_id": n,
            "question_polarity": polarity,
            "answer_info": {"ans0": a, "ans1": b, "ans2": ["unknown", "unknown"]},
            "additional_metadata": {"stereotyped_groups": groups},
        }
        for n, (a, b, groups) in enumerate(GROUPS)
    ]
    ours = load_benchmark("bbq", write(tmp_path / "b.jsonl", *rows)).items
    datasets.disable_progress_bars()
    theirs = harness_bbq.process_docs(datasets.Dataset.from_list(rows))
    datasets.enable_progress_bars()
    for item, doc in zip(ours, theirs, strict=True):
        assert [item.options[item.meta["biased"]]] == doc["biased_answers"], doc["answer_info"]


def test_a_target_column_stands_in_for_the_groups(tmp_path):
    rows = [
        {k: v for k, v in BBQ.items() if k not in ("answer_info", "additional_metadata", "label")}
        | {"answer_label": 2, "target_label": 0, "question_polarity": polarity}
        for polarity in ("neg", "nonneg")
    ]
    first, second = load_benchmark("bbq", write(tmp_path / "b.jsonl", *rows)).items
    assert (first.meta["biased"], second.meta["biased"], first.meta["unknown"]) == (0, 1, 2)
    same = BBQ | {"answer_info": {k: [v[0], "old"] for k, v in BBQ["answer_info"].items() if k != "ans2"}}
    assert load_benchmark("bbq", write(tmp_path / "c.jsonl", same)).items[0].meta["biased"] is None
