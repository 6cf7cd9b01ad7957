"""What a report is made of before it is a page: numbers that know their record, tables, charts, takeaways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mechdiff.reporting.report.verdict import Verdict, words
from mechdiff.results import Record

PERCENT = frozenset(
    {"refusal_rate", "mc_acc", "exact_match", "new_token_mass"}
    | {"churn", "churn_bh", "churn_p", "churn_difference"}
)
"""Shares that are read as per cent, and their differences as percentage points."""
WHOLE = frozenset({"layer", "heads", "directions", "prompts", "degrees"})
"""Units of whole numbers."""
DASH = "–"


@dataclass(frozen=True)
class Number:
    """A number as it is shown, with the record behind it.

    Attributes:
        anchor: Identifier of its row in the table of records; empty if it has none.
        text: The value as text.
        interval: Its 95 % interval as text, empty if there is none.
        hint: What it is, in words.
        full: Whether the interval is written beside it.
    """

    anchor: str
    text: str
    interval: str = ""
    hint: str = ""
    full: bool = True


Inline = str | Number
Cell = Sequence[Inline]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    parts: Sequence[Inline]
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows under a heading; the first column names the row. Print leaves details to the page on screen."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    detail: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A drawing (SVG as text) with what it shows, in words."""

    svg: str
    caption: str
    control: str = ""
    kind: str = "chart"


@dataclass(frozen=True)
class Takeaway:
    """What may be said, with the verdict that allows it."""

    verdict: Verdict
    parts: Sequence[Inline]
    kind: str = "takeaway"


Block = Text | Table | Chart | Takeaway


@dataclass
class Panel:
    """What one pair shows of one question; side by side with those of the other pairs."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Section:
    """A section of the report."""

    anchor: str
    title: str
    intro: Sequence[Inline] = ()
    panels: list[Panel] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A record that the report cites: whose it is, and from which file."""

    anchor: str
    pair: str
    file: str
    record: Record


class Citations:
    """Numbers the records that a report shows, in order of first use."""

    def __init__(self) -> None:
        self.sources: dict[tuple[str, tuple[str, ...]], Source] = {}

    def __call__(self, pair: str, file: str, record: Record | None, full: bool = True) -> Inline:
        """Return a record as a number with a place in the table of records.

        Args:
            pair: Whose it is.
            file: The table that holds it.
            record: The record; None is shown as a dash.
            full: Write the interval beside the value.
        """
        if record is None:
            return DASH
        key = (pair, record.key)
        if key not in self.sources:
            self.sources[key] = Source(f"r{len(self.sources) + 1}", pair, file, record)
        text = words(record.reason) if record.value is None else shown(record, record.value)
        return Number(self.sources[key].anchor, text, interval(record), describe(pair, record), full)


def shown(record: Record, value: float) -> str:
    """Write a value in the unit in which its quantity is read, with a true minus sign."""
    if record.unit == "p":
        return f"{value:.3f}"
    if record.unit in WHOLE:
        return _minus(f"{value:.0f}")
    behaves = record.quantity in PERCENT and record.question == "rq1"
    if (behaves and record.model == "pair") or record.quantity == "churn_difference":
        return _minus(f"{100 * value:+.0f} pp")
    if record.quantity in PERCENT:
        digits = ".2g" if 0 < value < 0.01 else ".1f" if 0 < value < 0.1 else ".0f"
        return f"{format(100 * value, digits)} %"
    if record.unit == "pp":
        return _minus(f"{value:.1f} pp")
    if record.quantity == "side_effect_bpb":
        return _minus(f"{100 * value:+.1f} %")
    if record.quantity.startswith(("chosen_handle", "minimal_k")):
        return f"{value:.0f}"
    small = 0 < abs(value) < 0.1 and record.unit in ("nats", "bits")
    return _minus(f"{value:.2g}" if small else f"{value:.2f}")


def interval(record: Record) -> str:
    """Write a 95 % interval; one that is open on one side names the side that it bounds."""
    low, high = (None if end is None else _bare(record, end) for end in (record.low, record.high))
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return f"≤ {high}" if low is None else f"≥ {low}"
    return f"[{low}, {high}]"


def describe(pair: str, record: Record) -> str:
    """Say what a record is, for the pointer and for a screen reader."""
    parts: list[str] = [pair, words(record.quantity)]
    parts += [str(p) for p in (record.site, record.positions) if p]
    parts += [f"{words(k)} {v}" for k, v in record.params.items() if v is not None and v is not False]
    ends = interval(record)
    parts += [f"95 % interval {ends}" if ends else "no interval", f"n = {record.n:,}"]
    parts += [f"control: {words(record.control)}" if record.control != "none" else f"split {record.split}"]
    return ", ".join(parts)


def _bare(record: Record, value: float) -> str:
    """Write an end of an interval: as its value, without the unit."""
    return shown(record, value).removesuffix(" pp").removesuffix(" %")


def _minus(text: str) -> str:
    """Put a true minus sign, and none before a number that is rounded to 0."""
    sign, digits = text[:1], text[1:]
    nothing = not any(c in "123456789" for c in digits)
    return digits if sign == "-" and nothing else text.replace("-", "−")


def joined(parts: Iterable[Inline], by: str = ", ") -> list[Inline]:
    """Put a separator between parts."""
    found: list[Inline] = []
    for part in parts:
        found += [by, part] if found else [part]
    return found
