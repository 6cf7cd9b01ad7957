"""Score generated answers. What cannot be parsed is named, not turned into a silent 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mechdiff.data.benchmarks.items import Item
from mechdiff.data.benchmarks.maths import Verdict
from mechdiff.errors import PromptError
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


@dataclass(frozen=True)
class Summary:
    """Counts over scored answers.

    Attributes:
        n: Number of answers.
        right: Number of right ones.
        unparsed: Ids without a verdict, each with its reason.
    """

    n: int
    right: int
    unparsed: tuple[tuple[str, str], ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers among all: one that cannot be read is not right."""
        return self.right / self.n

    @property
    def accuracy_parsed(self) -> float | None:
        """Share of right answers among those that could be read; None if none could."""
        parsed = self.n - len(self.unparsed)
        return self.right / parsed if parsed else None


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


def summarise(scored: Iterable[Scored]) -> Summary:
    """Count right answers, and list those that could not be read.

    Raises:
        PromptError: If there is none.
    """
    rows = list(scored)
    if not rows:
        raise PromptError(
            "no answer to score; a benchmark must hold at least one item (key: pair.benchmarks)"
        )
    unparsed = tuple((s.id, s.reason or "") for s in rows if s.correct is None)
    return Summary(len(rows), sum(s.correct is True for s in rows), unparsed)
