"""A takeaway whose interval covers the control says that no effect was found."""

from dataclasses import replace

import pytest

from mechdiff.reporting.report.verdict import judge, judge_p
from mechdiff.results import Record


def number(
    value: float | None, low: float | None = None, high: float | None = None, control: str = "none"
) -> Record:
    reason = "gap_too_small" if value is None else None
    return Record("rq2", "r2_delta", value, 40, "fraction", low, high, control=control, reason=reason)


@pytest.mark.parametrize(
    ("record", "controls", "kind", "why"),
    [
        (number(0.6, 0.5, 0.7), [number(0.4, control="mean_shift")], "found", "beyond mean shift"),
        (number(0.6, 0.5, 0.7), [number(0.55, control="mean_shift")], "none", "covers mean shift"),
        (number(0.6, 0.5, 0.7), [number(0.5, control="mean_shift")], "none", "covers mean shift"),  # touching
        (
            number(0.6, 0.5, 0.7),
            [number(0.4, 0.3, 0.52, "random")],
            "none",
            "covers random",
        ),  # its interval counts
        (
            number(0.6, 0.5, 0.7),
            [number(0.4, None, 0.52, "random")],
            "none",
            "covers random",
        ),  # a 95th percentile
        (number(0.2, 0.1, 0.3), [number(0.4, control="mean_shift")], "none", "other side of mean shift"),
        (
            number(0.6, 0.5, 0.7),
            [number(0.1, control="mean_shift"), number(0.65, control="shuffled")],
            "none",
            "covers shuffled",
        ),
        (number(0.6, 0.5, 0.7), [], "untested", "no control"),
        (number(0.6, 0.5, 0.7), [None, number(None, control="shuffled")], "untested", "no control"),
        (number(0.6), [number(0.4, control="mean_shift")], "untested", "no interval"),
        (number(None), [number(0.4, control="mean_shift")], "untested", "gap too small"),
        (None, [number(0.4, control="mean_shift")], "untested", "not measured"),
    ],
)
def test_an_effect_is_claimed_beyond_every_control_only(
    record: Record | None, controls: list[Record | None], kind: str, why: str
) -> None:
    verdict = judge(record, controls)
    assert verdict.kind == kind
    assert why in verdict.why
    assert verdict.found == (kind == "found")


@pytest.mark.parametrize(
    ("record", "side", "kind"),
    [
        (number(0.3, 0.1, 0.5), "either", "found"),
        (number(-0.3, -0.5, -0.1), "either", "found"),
        (number(-0.3, -0.5, -0.1), "above", "none"),
        (number(-0.3, -0.5, -0.1), "below", "found"),
        (number(0.1, -0.1, 0.3), "either", "none"),
        (number(0.0, 0.0, 0.0), "either", "none"),
        (number(0.3, 0.1, None), "above", "found"),
        (number(0.3, 0.1, None), "either", "untested"),
        (number(0.3, None, 0.4), "above", "untested"),
    ],
)
def test_a_difference_is_judged_against_0(record: Record, side, kind: str) -> None:
    assert judge(record, null=0.0, side=side).kind == kind


def test_few_prompts_allow_no_claim() -> None:
    few = replace(number(0.6, 0.5, 0.7), n=5)
    assert judge(few, [number(0.1, control="random")]).why == "too few prompts (n = 5)"
    assert judge(replace(few, n=6), [number(0.1, control="random")]).found


def test_what_a_run_has_compared_prompt_by_prompt_counts() -> None:
    record = replace(number(0.6, 0.5, 0.7), flags=("within_random",))
    assert judge(record, [number(0.1, control="random")]).kind == "none"


@pytest.mark.parametrize(
    ("p", "kind"), [(0.001, "found"), (0.05, "found"), (0.051, "none"), (None, "untested")]
)
def test_the_largest_of_many_is_judged_over_all_of_them(p: float | None, kind: str) -> None:
    reason = None if p is not None else "too_few_prompts"
    assert judge_p(Record("rq4", "churn_p", p, 40, "p", reason=reason)).kind == kind
    assert judge_p(None).kind == "untested"


def test_the_words_of_a_verdict() -> None:
    covered = judge(number(0.6, 0.5, 0.7), [number(0.55, control="mean_shift")])
    assert covered.words == "no effect found"
    assert judge(None).words == "no claim"
