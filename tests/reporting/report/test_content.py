"""How numbers are written: in the unit in which they are read, with their interval, linked to one record."""

from __future__ import annotations

import pytest

from mechdiff.reporting.report.content import Citations, Number, interval, shown
from mechdiff.results import Record


def number(
    quantity: str, value: float, unit: str = "fraction", question: str = "rq1", **more: object
) -> Record:
    return Record(question, quantity, value, 40, unit, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "text", "ends"),
    [
        (number("refusal_rate", 0.9, model="tuned", low=0.763, high=0.972), "90 %", "[76, 97]"),
        (number("refusal_rate", 0.35, low=-0.05, high=0.6), "+35 pp", "[−5, +60]"),
        (number("new_token_mass", 0.0002, model="tuned"), "0.02 %", ""),
        (number("cka", 0.9949), "0.99", ""),
        (number("patch_recovery", -0.0012, low=-0.004, high=0.2), "0.00", "[0.00, 0.20]"),
        (number("patch_recovery", -4.03), "−4.03", ""),
        (number("patch_kl", 0.00041, "nats", low=0.00028, high=0.00053), "0.00041", "[0.00028, 0.00053]"),
        (number("chosen_layer", 18.0, "layer"), "18", ""),
        (number("side_effect_bpb", 0.04, question="rq3", high=0.048), "+4.0 %", "≤ +4.8"),
        (number("side_effect_pp", 1.6, "pp", "rq3", high=4.3), "1.6 pp", "≤ 4.3"),
        (number("minimal_k_10", 2.0, "directions", "rq3", low=1.0, high=4.0), "2", "[1, 4]"),
        (number("churn", 0.063, question="rq4", low=0.037, high=0.11), "6.3 %", "[3.7, 11]"),
        (number("churn_p", 0.0009, "p", "rq4"), "0.001", ""),
    ],
)
def test_a_number_is_written_as_it_is_read(record: Record, text: str, ends: str) -> None:
    assert shown(record, record.value or 0.0) == text
    assert interval(record) == ends


def test_a_record_is_numbered_once_and_told_in_words() -> None:
    cite = Citations()
    record = number("patch_recovery", 0.7, low=0.6, high=0.8, site="resid_post.3", positions="last")
    first, again = cite("mine", "results.json", record), cite("mine", "results.json", record)
    assert isinstance(first, Number)
    assert first == again
    assert first.anchor == "r1"
    for said in ("mine", "patch recovery", "resid_post.3", "95 % interval [0.60, 0.80]", "n = 40"):
        assert said in first.hint
    other = cite("yours", "results.json", record)
    assert isinstance(other, Number)
    assert other.anchor == "r2"
    assert cite("mine", "results.json", None) == "–"
