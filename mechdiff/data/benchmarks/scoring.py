"""Score generated answers. What cannot be parsed is named, not turned into a silent 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mechdiff.data.benchmarks.items import Item
from mechdiff.data.benchmarks.maths import Verdict
from mechdiff.functional.answers import (
    Rule,
    flexible_answer,
    last_boxed,
    parse_number,
    same_answer,
    strict_answer,
)


class Scored(NamedTuple):
    """One scored answer.

    Attributes:
        id: Id of the item.
        answer: What was read out of the text; None if nothing was.
        correct: None if no answer could be read, or if no comparison came to an end.
        reason: Why `correct` is None.
    """

    id: str
    answer: str | None
    correct: bool | None
    reason: str | None = None


def score_number(item: Item, text: str, *, strict: bool = False, rule: Rule = "harness") -> Scored:
    """Score a generated solution of a word problem.

    Args:
        item: Item of kind ``exact``.
        text: What the model wrote.
        strict: Read the number after ``####`` only, instead of the last one.
        rule: How numbers are compared; ``harness`` is comparable with published results.
    """
    assert item.kind == "exact"
    assert isinstance(item.gold, str)
    answer = strict_answer(text) if strict else flexible_answer(text)
    if answer is None:
        return Scored(item.id, None, None, "no number after ####" if strict else "no number")
    if parse_number(answer) is None and not same_answer(item.gold, answer, rule):
        return Scored(item.id, answer, None, "not a number")
    return Scored(item.id, answer, same_answer(item.gold, answer, rule))


def score_math(item: Item, text: str, judge: Callable[[str, str], Verdict]) -> Scored:
    """Score a generated solution of a MATH problem.

    Args:
        item: Item of kind ``math``.
        text: What the model wrote.
        judge: `maths.MathJudge`, or `maths.equivalent` for trusted texts.
    """
    assert item.kind == "math"
    assert isinstance(item.gold, str)
    verdict = judge(item.gold, text)
    answer = last_boxed(text)
    if verdict in ("unparsable", "undecided"):
        return Scored(item.id, answer, None, verdict)
    return Scored(item.id, answer, verdict == "right")
