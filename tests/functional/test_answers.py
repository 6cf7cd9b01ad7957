"""Extraction of answers against lm-evaluation-harness on tricky strings, and comparison of numbers."""

from decimal import Decimal
from pathlib import Path

import lm_eval
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter

from mechdiff.functional.answers import (
    flexible_answer,
    last_boxed,
    normalise_answer,
    parse_number,
    same_answer,
    strict_answer,
    strip_calculator,
)

TASK = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text(encoding="utf-8"))
TRICKY = [
    "",
    " ",
    "no number at all",
    "42",
    "#### 42",
    "####42",
    "####  42",
    "### 42",
    "##### 42",
    "#### -7",
    "#### − 7",
    "#### $18",
    "#### 1,234",
    "#### 1,234.50",
    "#### 1.234,50",
    "#### 42.",
    "#### 42%",
    "#### .5",
    "#### ...",
    "#### ,",
    "#### x = 3",
    "#### 3 #### 4",
    "#### 3\n#### 4",
    "#### 5 apples, 6 pears",
    "The answer is 42.",
    "The answer is $42.",
    "The answer is $1,050.00.",
    "It costs $3 each, so $12 in all",
    "10/3",
    "3-4",
    "3 - 4",
    "--5",
    "-5-",
    "1e6",
    "1_000",
    "2^10 = 1024",
    "The answer is **7**",
    r"The answer is \boxed{7}.",
    "She has 3. He has none...",
    "Wait... what?",
    "$",
    "$$",
    "£5",
    "5€",
    "٣ apples",
    "жауап: 15",
    "жауабы 15.",
    "The year 2023-2024",
    "12:30",
    "192.168.0.1",
    "one hundred",
    "He sold 48/2 = <<48/2=24>>24 clips.\n#### 24",
    "Question: 5+5?\nAnswer: 10\n\nQuestion: 1+1?\nAnswer: 2",
    "#### 7\nQuestion: How many is 9?",
    "The final answer is 18.0",
    "١٢",
    "²",
    "3\u00a0000",
    "#### 3 000",
    "0042",
    "+7",
    "1,2,3",
]
GOLDS = ["42", "1234.50", "-7", "18", "3", "7", "24", "1,234", "18.0"]


def harness(name: str, text: str) -> str | None:
    settings = next(f for f in TASK["filter_list"] if f["name"] == name)["filter"][0]
    options = {key: value for key, value in settings.items() if key != "function"}
    answer = next(iter(RegexFilter(**options).apply([[text]], [{}])))[0]
    return None if answer == "[invalid]" else answer


def agree(gold: str, answer: str) -> bool:
    options = {
        key: value
        for key, value in TASK["metric_list"][0].items()
        if key not in ("metric", "aggregation", "higher_is_better")
    }
    return bool(exact_match_hf_evaluate([answer], [gold], **options)["exact_match"])


def test_the_list_is_long_and_the_task_is_the_one_we_know():
    assert len(set(TRICKY)) == len(TRICKY) >= 40
    assert TASK["metadata"]["version"] == 3.0


@pytest.mark.parametrize("text", TRICKY)
def test_filters_equal_the_harness(text):
    assert strict_answer(text) == harness("strict-match", text)
    assert flexible_answer(text) == harness("flexible-extract", text)


@pytest.mark.parametrize("text", TRICKY)
def test_the_harness_metric_is_reproduced(text):
    for gold in GOLDS:
        for answer in filter(None, (strict_answer(text), flexible_answer(text), text)):
            assert same_answer(gold, answer) == agree(gold, answer)
            assert same_answer(f"steps\n#### {gold}", answer) == agree(f"steps\n#### {gold}", answer)


@given(st.text(alphabet="#$-0123456789., \nx", max_size=30))
def test_filters_equal_the_harness_on_any_text(text):
    assert strict_answer(text) == harness("strict-match", text)
    assert flexible_answer(text) == harness("flexible-extract", text)
    assert same_answer("12", text) == agree("12", text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        (" $1,250. ", "1250"),
        ("-3.50", "-3.50"),
        ("25%", "25"),
        ("1,234,567.5", "1234567.5"),
        ("1,23", None),
        ("...", None),
        ("", None),
        ("nan", None),
        ("1e5000000000000000000000", None),
        ("3 4", None),
        ("10/3", None),
    ],
)
def test_numbers_are_read_or_refused(text, number):
    assert parse_number(text) == (None if number is None else Decimal(number))


def test_value_rule_sees_through_notation():
    assert same_answer("1,234.50", "$1234.5", "value")
    assert not same_answer("1,234.50", "$1234.5")
    assert not same_answer("x", "x", "value")
    assert normalise_answer("A #### B.") == "b"


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\fbox{3}", "3"),
        (r"$\boxed 4$", "4"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{}", ""),
        (r"\boxed", None),
        ("7", None),
    ],
)
def test_last_box(text, inside):
    assert last_boxed(text) == inside


def test_calculator_marks_vanish():
    assert strip_calculator("a<<1+1=2>>2 b") == "a2 b"
