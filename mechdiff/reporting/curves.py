"""Curves of a run over layers and over k, and the page of TensorBoard that shows them.

1. Records that differ in their layer alone, or in k alone, are one curve; layer or k is the step.
2. Ends of the intervals are curves too, under ``ends``, out of the way of what is read by eye.
3. Each chart of the custom scalars shows a curve with its interval, or beside its controls.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mechdiff.reporting.cells import REPORTED_SPLITS, component, layer
from mechdiff.results import Record, Results

Axis = Literal["layer", "k"]

PAGES: dict[str, tuple[str, Axis, tuple[tuple[str, ...], ...]]] = {
    "RQ1 by layer: where states differ, and what patching them does": (
        "rq1",
        "layer",
        (("cka_debiased",), ("patch_recovery",), ("patch_effect",), ("graft_recovery",)),
    ),
    "RQ2 by layer: R², how much of the difference a map explains": (
        "rq2",
        "layer",
        (("r2_delta",), ("r2",), ("cka_debiased",)),
    ),
    "RQ2 by layer: KL, what a patched state costs": (
        "rq2",
        "layer",
        (("kl_raw", "kl_mapped"), ("kl_reduction",), ("patch_agreement",)),
    ),
    "RQ3 against k: effect of a handle": (
        "rq3",
        "k",
        (("interchange_recovery",), ("steer_effect",), ("ablate_effect",)),
    ),
    "RQ3 against k: side effects on neutral prompts": (
        "rq3",
        "k",
        (("side_effect_bpb",), ("side_effect_pp",)),
    ),
    "RQ4 against k: heads patched together, and shared by both rankings": (
        "rq4",
        "k",
        (("cumulative_effect",), ("topk_overlap",), ("jaccard",), ("truth_overlap",)),
    ),
}
"""Categories of the custom scalars: question, what the curves run over, and the quantities of each chart."""


PLACED = ("positions", "model")
"""Attributes of a record that its controls share."""
FREE = frozenset({"solver", "lambda_", "source_site"})
"""Parameters in which a control may differ."""


@dataclass
class Curve:
    """Records that differ in their place on the axis alone.

    Attributes:
        tag: Its name in TensorBoard.
        cell: What a control of it shares with it.
        points: Its records by place.
    """

    tag: str
    cell: dict[str, Any]
    points: dict[int, Record] = field(default_factory=dict)

    @property
    def control(self) -> str:
        """Which control it is, ``none`` for the quantity itself."""
        return next(iter(self.points.values())).control

    def belongs_to(self, cell: dict[str, Any]) -> bool:
        """Whether it is drawn in the chart of a cell: as the quantity itself, or as a control of it.

        A control may lack a parameter, and is fitted in its own way; what else it has must be the cell's.
        """
        if self.control == "none":
            return self.cell == cell
        return all(
            {**_cell(r, True), **{name: getattr(r, name) for name in PLACED}}.get(k, v) == v
            for r in self.points.values()
            for k, v in cell.items()
            if k not in FREE
        )


def log_curves(writer: Any, results: Results) -> None:
    """Write the curves of a run and the layout of its custom scalars.

    Args:
        writer: A TensorBoard writer.
        results: Table of the run.
    """
    layout: dict[str, dict[str, list[str | list[str]]]] = {}
    for page, (question, axis, charts) in PAGES.items():
        shown: dict[str, list[str | list[str]]] = {}
        for quantities in charts:
            found = [c for q in quantities for c in curves(results, question, q, axis)]
            for curve in found:
                _write(writer, curve)
            shown |= dict(_charts(found, quantities))
        if shown:
            layout[page] = shown
    if layout:
        writer.add_custom_scalars(layout)


def curves(results: Results, question: str, quantity: str, axis: Axis) -> list[Curve]:
    """Return the curves of a quantity and of its controls, in the order of the table.

    Args:
        results: Table of a run.
        question: The question that they answer.
        quantity: What was measured.
        axis: What they run over.
    """
    held = [
        r
        for r in results.select(question=question, quantity=quantity)
        if _on(r, axis) and r.value is not None
    ]
    if axis == "k":
        named = told_apart(held, lambda r: r.params["k"], lambda r: "", by_site=True)
    else:
        named = told_apart(held, lambda r: r.site)
    found: dict[str, Curve] = {}
    for r, (name, telling) in zip(held, named, strict=True):
        place = [component(str(r.site))] if axis == "layer" else []
        tag = "/".join([f"by_{axis}", question, *place, name])
        cell = {**{key: getattr(r, key) for key in PLACED}, **telling}
        x = layer(str(r.site)) if axis == "layer" else int(r.params["k"])
        found.setdefault(tag, Curve(tag, cell)).points[x] = r
    return list(found.values())


def told_apart(
    records: Sequence[Record],
    place: Callable[[Record], Any],
    line: Callable[[Record], Any] = lambda r: component(r.site or ""),
    by_site: bool = False,
) -> list[tuple[str, dict[str, Any]]]:
    """Name records so that no two of one place have the same name.

    A name has the quantity, the positions, the model and the control; and the parameters that tell records of
    that name apart at any one place of a line, so that a line has one name along all of its places.

    Args:
        records: What is named.
        place: Where a record lies.
        line: What records of one line have in common.
        by_site: Whether a site may tell records apart, which it does where it is no place.

    Returns:
        For each record its name, and the parameters in it.
    """
    cells = [_cell(r, by_site) for r in records]
    lines: dict[tuple[Any, str], dict[Any, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for r, cell in zip(records, cells, strict=True):
        lines[line(r), _name(r)][place(r)].append(cell)
    keys = {key: _telling(places.values()) for key, places in lines.items()}
    named = []
    for r, cell in zip(records, cells, strict=True):
        telling = {k: cell[k] for k in keys[line(r), _name(r)] if k in cell}
        named.append(("/".join([_name(r), *(f"{k}={v}" for k, v in telling.items())]), telling))
    return named


def _telling(places: Collection[Sequence[dict[str, Any]]]) -> list[str]:
    """Return the first keys, in their order, that tell apart the cells of one place, at every place."""
    chosen: list[str] = []

    def told(keys: Sequence[str]) -> int:
        return sum(len({tuple(repr(cell.get(k)) for k in keys) for cell in cells}) for cells in places)

    for key in dict.fromkeys(k for cells in places for cell in cells for k in cell):
        if told([*chosen, key]) > told(chosen):
            chosen.append(key)
    return chosen


def _name(r: Record) -> str:
    told = [r.model if r.model != "pair" else None, r.control if r.control != "none" else None]
    return "/".join(part for part in (r.quantity, r.positions, *told) if part)


def _cell(r: Record, by_site: bool) -> dict[str, Any]:
    return {"question": r.question, "split": r.split, **({"site": r.site} if by_site else {}), **r.params}


def _on(r: Record, axis: Axis) -> bool:
    """Whether a record is a point of a curve; a matrix of layers has its diagonal on it."""
    if r.split not in (*REPORTED_SPLITS, "all"):
        return False
    if axis == "k":
        return isinstance(r.params.get("k"), int)
    own = "matrix" not in r.params and r.params.get("source_site") in (None, r.site)
    return r.site is not None and "head" not in r.params and (own or r.control == "wrong_layer")


def _write(writer: Any, curve: Curve) -> None:
    for x, r in sorted(curve.points.items()):
        writer.add_scalar(curve.tag, r.value, x)
        for end, value in (("low", r.low), ("high", r.high)):
            writer.add_scalar(f"ends/{curve.tag}/{end}", r.value if value is None else value, x)


def _charts(found: Sequence[Curve], quantities: Sequence[str]) -> Iterator[tuple[str, list[str | list[str]]]]:
    """Yield title and content of charts: each curve with its interval, then those of a cell together."""
    own = [curve for curve in found if curve.control == "none"]
    for curve in own:
        if any(r.low is not None or r.high is not None for r in curve.points.values()):
            ends = [f"ends/{curve.tag}/{end}" for end in ("low", "high")]
            yield f"{_title(curve)}, 95 % interval", ["Margin", [curve.tag, *ends]]
    for cell in {repr(curve.cell): curve.cell for curve in own}.values():
        beside = [curve for curve in found if curve.belongs_to(cell)]
        if len(beside) > 1:
            named = " and ".join(q for q in quantities if any(q in curve.tag for curve in beside))
            told = [
                named,
                *(str(v) if k in PLACED else f"{k}={v}" for k, v in cell.items() if v not in ("pair", None)),
            ]
            patterns = [f"^{re.escape(curve.tag)}$" for curve in beside]
            yield f"{', '.join(told)}, beside its controls", ["Multiline", patterns]


def _title(curve: Curve) -> str:
    parts = curve.tag.split("/")[2:]
    return ", ".join(part for part in parts if part != "resid_post")
