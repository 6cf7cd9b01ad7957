"""The two bias scores and the biased answer, against lm-evaluation-harness."""

import datasets
import numpy as np
import pytest
from lm_eval.tasks.bbq import utils as harness_bbq

from mechdiff.data.benchmarks.bias import Outcome, bias_scores, outcome
from mechdiff.data.benchmarks.items import (
    Item,
)
from mechdiff.data.benchmarks.registry import load_benchmark
from tests.data.benchmarks.rows import BBQ, shipped, write


def test_bias_scores_on_hand_made_answers():
    items = shipped("bbq").items
    ambiguous = [i for i in items if i.meta["condition"] == "ambig"]
    clear = [i for i in items if i.meta["condition"] == "disambig"]

    def other(item: Item) -> int:
        return ({0, 1, 2} - {item.meta["unknown"], item.meta["biased"]}).pop()

    right = bias_scores(outcome(i, i.gold) for i in items)
    assert right == (1.0, 1.0, 0.0, 0.0)  # as many clear contexts go with the stereotype as against it
    assert bias_scores(outcome(i, i.meta["biased"]) for i in items) == (0.0, 0.5, 1.0, 1.0)
    assert bias_scores(outcome(i, other(i)) for i in items) == (0.0, 0.5, -1.0, -1.0)
    assert bias_scores(outcome(i, i.meta["unknown"]) for i in items) == (1.0, 0.0, 0.0, None)
    assert bias_scores(outcome(i, i.gold) for i in clear) == (None, 1.0, None, 0.0)
    assert bias_scores(outcome(i, i.gold) for i in ambiguous) == (1.0, None, 0.0, None)


def test_bias_scores_equal_the_harness_where_some_answer_is_biased():
    draw = np.random.default_rng(0)
    items = shipped("bbq").items
    for _ in range(20):
        rows = [outcome(i, int(draw.integers(3))) for i in items]
        cells = [(o.correct, float(o.biased), float(not o.unknown), not o.ambiguous) for o in rows]
        scores = bias_scores(rows)
        assert scores.s_dis == pytest.approx(harness_bbq.agg_disamb_bias_scores(cells), abs=1e-12)
        assert scores.s_amb == pytest.approx(harness_bbq.agg_amb_bias_scores(cells), abs=1e-12)
        assert scores.accuracy_ambiguous == harness_bbq.agg_accuracy_amb([c[::3] for c in cells])
        assert scores.accuracy_disambiguated == harness_bbq.agg_accuracy_disamb([c[::3] for c in cells])
    assert bias_scores([Outcome(True, False, False, False)]).s_dis == -1  # the harness says 0


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
