"""One pair as the parts of a report see it: its records, and how they are written with n and control."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mechdiff.reporting.cells import layer
from mechdiff.reporting.report.charts import Point
from mechdiff.reporting.report.content import DASH, Cell, Citations, Inline, describe, shown
from mechdiff.reporting.report.runs import Pair
from mechdiff.reporting.report.verdict import Side, Verdict, judge, words
from mechdiff.results import Record


class View:
    """A pair whose numbers are cited as they are shown.

    Args:
        pair: The pair.
        cite: The numbering of the report.
    """

    def __init__(self, pair: Pair, cite: Citations) -> None:
        self.pair, self.cite = pair, cite
        self.name = pair.name

    def has(self, question: str) -> bool:
        """Whether the question has a run."""
        return question in self.pair.runs

    def number(self, record: Record | None, full: bool = True) -> Inline:
        """Return a record as a number that links to its row."""
        file = "" if record is None else self.pair.file(record.question)
        return self.cite(self.name, file, record, full)

    def controls(self, record: Record | None, names: Iterable[str]) -> list[Record]:
        """Return the controls of a record: the same cell under another name."""
        if record is None:
            return []
        found = []
        for name in names:
            beside = [
                r
                for r in self.pair.select(record.question, quantity=record.quantity, control=name)
                if _same_cell(record, r)
            ]
            found += beside
        return found

    def sentence(self, record: Record | None, controls: Sequence[Record] = ()) -> list[Inline]:
        """Write a number with n and its controls, for running text."""
        if record is None:
            return ["not measured"]
        parts: list[Inline] = [self.number(record), f" (n = {record.n:,}"]
        for r in controls:
            parts += [f"; {named(r)} ", self.number(r)]
        return [*parts, ")"]

    def row(
        self,
        label: str,
        record: Record | None,
        controls: Sequence[Record | None],
        *more: Cell,
        null: float | None = None,
        side: Side = "above",
    ) -> list[Cell]:
        """Write a row: label, value, controls, verdict, whatever more, n."""
        verdict = judge(record, controls, null=null, side=side)
        cells: list[Cell] = [[label], [self.number(record)]]
        cells += [[self.number(r)] for r in controls]
        return [*cells, [mark(verdict)], *more, [count(record)]]

    def point(self, x: float, record: Record, away_from: float | None = None) -> Point | None:
        """Return a record as a mark of a chart, None if it has no value.

        Args:
            x: Its place.
            record: The record.
            away_from: Draw this minus the value, such as 1 − CKA.
        """
        if record.value is None:
            return None
        ends = (record.low, record.high)
        value: float = record.value
        if away_from is not None:
            value = away_from - value
            ends = tuple(None if e is None else away_from - e for e in reversed(ends))  # type: ignore[assignment]
        said = f"{shown(record, record.value)}: {describe(self.name, record)}"
        return Point(x, value, ends[0], ends[1], said)

    def points(self, records: Iterable[Record], away_from: float | None = None) -> list[Point]:
        """Return records as marks by layer; those without a value are left out."""
        held = [(layer(str(r.site)), r) for r in records if r.site]
        found = (self.point(x, r, away_from) for x, r in sorted(held, key=lambda item: item[0]))
        return [p for p in found if p is not None]


def mark(verdict: Verdict) -> str:
    """Write a verdict for a cell of a table."""
    return {"found": "✓ found", "none": "✗ none found", "untested": f"– {verdict.why}"}[verdict.kind]


def named(control: Record) -> str:
    """Write the name of a control: how it was drawn, or of which model it is, where several share one."""
    about = [str(control.params["draw"])] if control.params.get("draw") else []
    about += [control.model] if control.model != "pair" else []
    return words(control.control) + (f" ({', '.join(about)})" if about else "")


def count(record: Record | None) -> str:
    """Write how many prompts are behind a number."""
    return DASH if record is None else f"{record.n:,}"


def span(records: Iterable[Record | None]) -> str:
    """Write the range of n of some records."""
    sizes = sorted({r.n for r in records if r is not None and r.n})
    if not sizes:
        return "0"
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def _same_cell(record: Record, other: Record) -> bool:
    """Whether two records differ in their control alone; what a control does not have may be missing."""
    places = ("site", "positions", "split", "model")
    if any(getattr(record, p) != getattr(other, p) for p in places):
        return False
    free = {"solver", "lambda_", "draw", "draws", "source_site"}
    return all(other.params[k] == v for k, v in record.params.items() if k in other.params and k not in free)
