"""When a number may be called an effect.

1. A claim needs some prompts, an interval, and at least one control or a value that the quantity has where
   nothing differs.
2. It is found where the interval lies wholly beyond every control, and beyond the control's own interval
   where that has one: of random draws, beyond their 95th percentile.
3. Else no effect is found. What cannot be judged is said to be untested and is never called found.

Two intervals that do not touch are a stricter test than the interval of their difference, and need no more
than the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mechdiff.results import Record

Side = Literal["above", "below", "either"]

FEWEST = 6
"""Prompts below which nothing is claimed: sign flips of 5 have no p below 0.05 on both sides."""
LEVEL_P = 0.05
WITHIN_RANDOM = "within_random"
"""Flag of a run that has compared an effect with random ones prompt by prompt, and found no more."""
NO_RANDOM = "no_random_control"
"""Flag of a run that has not compared it with enough random ones of its kind and rank."""


@dataclass(frozen=True)
class Verdict:
    """What may be said of a number.

    Attributes:
        kind: ``found``, ``none`` (no effect found) or ``untested``.
        why: The reason, as the end of a sentence.
    """

    kind: Literal["found", "none", "untested"]
    why: str

    @property
    def found(self) -> bool:
        """Whether an effect may be claimed."""
        return self.kind == "found"

    @property
    def words(self) -> str:
        """The verdict as a sentence opens."""
        return {"found": "effect found", "none": "no effect found", "untested": "no claim"}[self.kind]


def judge(
    record: Record | None,
    controls: Sequence[Record | None] = (),
    *,
    null: float | None = None,
    side: Side = "above",
) -> Verdict:
    """Say whether a number differs from its controls.

    Args:
        record: The number.
        controls: What it has to differ from; those that were not measured are passed over.
        null: The value that it has where nothing differs, such as 0 for a difference of two models.
        side: Where an effect lies: ``above`` its controls, ``below`` them, or on ``either`` side.
    """
    if record is None:
        return Verdict("untested", "not measured")
    if record.value is None:
        return Verdict("untested", f"not measurable: {words(record.reason)}")
    if record.n < FEWEST:
        return Verdict("untested", f"too few prompts (n = {record.n})")
    if WITHIN_RANDOM in record.flags:
        return Verdict("none", "random subspaces do as much on the same prompts")
    if NO_RANDOM in record.flags:
        return Verdict("untested", "too few random subspaces, or none, stand beside it")
    needed = {"above": (record.low,), "below": (record.high,), "either": (record.low, record.high)}[side]
    if any(end is None for end in needed):
        return Verdict("untested", "the estimate has no interval")
    against = [(words(r.control), *_ends(r)) for r in controls if r is not None and r.value is not None]
    if null is not None:
        against.append((f"{null:g}", null, null))
    if not against:
        return Verdict("untested", "no control was measured")
    for name, low, high in against:
        above = side != "below" and record.low is not None and record.low > high
        below = side != "above" and record.high is not None and record.high < low
        if not (above or below):
            return Verdict("none", _missed(record, name, low, high, side))
    names = ", ".join(dict.fromkeys(name for name, *_ in against))
    return Verdict("found", f"the interval lies beyond {names}")


def judge_p(record: Record | None) -> Verdict:
    """Say whether one of many numbers stands out, by its p over all: the largest always look large.

    Args:
        record: The family-wise p.
    """
    if record is None or record.value is None:
        return Verdict("untested", "no p over all of them was measured")
    if record.value <= LEVEL_P:
        return Verdict("found", f"p = {record.value:.3f} over all of them")
    return Verdict("none", f"as large a one arises where nothing differs, p = {record.value:.3f}")


def words(name: object) -> str:
    """Write a word of the records as prose."""
    return str(name).replace("_", " ")


def _ends(control: Record) -> tuple[float, float]:
    value = float(control.value or 0.0)
    low, high = (value if end is None else end for end in (control.low, control.high))
    return min(low, value), max(high, value)


def _missed(record: Record, name: str, low: float, high: float, side: Side) -> str:
    wrong = (side == "above" and record.high is not None and record.high < low) or (
        side == "below" and record.low is not None and record.low > high
    )
    return f"the interval lies on the other side of {name}" if wrong else f"the interval covers {name}"
