"""RQ4 of the report: which heads were rewired, against what labels swapped at random reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mechdiff.reporting.cells import layer
from mechdiff.reporting.report.charts import Point, Series, head_map, line_chart
from mechdiff.reporting.report.content import DASH, Cell, Chart, Inline, Panel, Section, Table, Takeaway
from mechdiff.reporting.report.verdict import Verdict, judge, judge_p, words
from mechdiff.reporting.report.view import View, count, mark, named, span
from mechdiff.results import Record

TOP = 8
MAPS = {
    "head_attribution": ("Change of a head's attribution, tuned − base", {}),
    "head_own_change": (
        "Change of the head itself: both models' weights on the same input",
        {"kind": "own", "metric": "norm"},
    ),
}
MAIN = ("method", "metric", "baseline")
SHARES: dict[str, tuple[str, bool]] = {
    "churn": ("churn", True),
    "churn_bh": ("share significant at a false discovery rate of 5 %", False),
    "churn_p": ("share with a family-wise p of at most 0.05", False),
    "concentration": ("heads that carry a share of the change", False),
    "topk_overlap": ("overlap of the highest heads, base and tuned", False),
    "rbo": ("rank-biased overlap, base and tuned", False),
    "cpr": ("CPR, area under the cumulative curve", True),
    "cmd": ("CMD, distance of that curve from 1", False),
    "truth_r": ("attribution against exact patching (r)", False),
    "truth_overlap": ("overlap of attribution's and patching's highest heads", False),
}
"""Quantities of all heads together, and whether more than their controls is a claim."""
CELL = ("rule", "floor", "floor_from", "share", "k", "persistence", "level")
"""Parameters that tell one share from another, besides how it was measured."""
KEPT = ("rule", "floor_from", "share", "k", "among", "of")
METHOD = (
    "Every head is attributed in both models on the same prompts: the gradient times what its "
    "contribution to the residual is, or would be with a baseline exchanged for it. Churn is the "
    "share of heads whose paired change lies beyond a floor with its whole 95 % interval. Controls: "
    "the same count under model labels swapped per prompt, between split halves of one model, and "
    "chance levels of the overlaps. A head's own change compares both models' weights on the same "
    "input and inherits nothing from below."
)


def section(views: Sequence[View]) -> Section:
    """Write the section on all pairs."""
    found = Section("rq4", "RQ4 — Structure change: which heads?", [METHOD])
    for view in views:
        if view.has("rq4"):
            found.panels.append(_panel(view))
    return found


def place(record: Record) -> tuple[int, int] | None:
    """Return layer and head of a record, None if it is about no single head."""
    head = record.params.get("head")
    if head is None:
        return None
    parts = str(head).split(".")
    if len(parts) == 2 and all(p.isdigit() for p in parts):
        return int(parts[0]), int(parts[1])
    return (layer(str(record.site)), int(parts[0])) if record.site and parts[0].isdigit() else None


def family(view: View) -> dict[str, object]:
    """Return method, metric and baseline of the main attribution, which is the first one of the pair."""
    first = view.pair.one("rq4", quantity="head_attribution", control="none", model="pair")
    return {} if first is None else {k: first.params.get(k) for k in MAIN}


def changes(view: View, quantity: str = "head_attribution") -> dict[tuple[int, int], Record]:
    """Return the changes of a pair's heads by layer and head."""
    about = MAPS[quantity][1] or family(view)
    found = view.pair.select("rq4", quantity=quantity, control="none", model="pair", of=None, **about)
    return {at: r for r in found if (at := place(r)) is not None}


def _panel(view: View) -> Panel:
    panel = Panel(view.name)
    for quantity, (said, _) in MAPS.items():
        found = changes(view, quantity)
        if found:
            spots = [
                (a, h, r.value, f"layer {a}, head {h}: {_said(r)}, n = {r.n}")
                for (a, h), r in sorted(found.items())
            ]
            unit = next(iter(found.values())).unit
            svg = head_map(f"{view.name}: {said}, by layer and head", spots, unit)
            panel.blocks.append(Chart(svg, f"{said} ({unit}), n = {span(found.values())} prompts."))
    panel.blocks += _cumulative(view)
    panel.blocks += _shares(view)
    panel.blocks += _largest(view)
    panel.blocks.append(takeaway(view))
    return panel


def _largest(view: View) -> list[Table]:
    found, own = changes(view), changes(view, "head_own_change")
    ordered = sorted(found, key=lambda at: -abs(found[at].value or 0.0))[:TOP]
    about = {"control": "none", **family(view)}
    rows: list[list[Cell]] = []
    for at in ordered:
        r = found[at]
        p = view.pair.one("rq4", quantity="churn_p", head=f"{at[0]}.{at[1]}", **about)
        cells: list[Cell] = [
            [view.number(r)],
            [mark(judge_p(p))],
            [view.number(p)],
            [view.number(own.get(at))],
        ]
        rows.append([[f"{at[0]}.{at[1]}"], *cells, [count(r)]])
    head = ["head", "tuned − base", "beyond swapped labels", "family-wise p", "own change", "n"]
    caption = (
        f"The {len(rows)} largest changes of {len(found)} heads (layer.head). Control: labels "
        "swapped per prompt, whose largest change gives p."
    )
    return [Table(caption, head, rows, detail=True)] if rows else []


def _said(r: Record) -> str:
    ends = "" if r.low is None or r.high is None else f" [{r.low:.2g}, {r.high:.2g}]"
    return words(r.reason) if r.value is None else f"{r.value:.3g}{ends} {r.unit}"


def _cumulative(view: View) -> list[Chart]:
    found = view.pair.select("rq4", quantity="cumulative_effect", of="all_heads")
    if not found:
        return []
    main = (found[0].model, *(found[0].params.get(k) for k in MAIN))
    found = [r for r in found if (r.model, *(r.params.get(k) for k in MAIN)) == main]
    series = [
        Series(name, _by_k(view, [r for r in found if r.control == control]), colour, line=control == "none")
        for colour, (control, name) in enumerate(
            (("none", "highest heads first"), ("random", "random order")), 1
        )
    ]
    ks = sorted({p.x for p in series[0].points})
    if not ks:
        return []
    label = f"{view.name}: effect of patching the highest heads together"
    shown = [s for s in series if s.points]
    svg = line_chart(label, shown, "heads patched (k)", "share of all heads' effect", ticks=ks, even=True)
    return [
        Chart(svg, f"Effect of the k highest heads patched together. Band: 95 % interval, n = {span(found)}.")
    ]


def _by_k(view: View, records: Iterable[Record]) -> list[Point]:
    ordered = sorted(records, key=lambda r: float(r.params["k"]))
    return [p for r in ordered if (p := view.point(float(r.params["k"]), r))]


def nulls(view: View, record: Record | None) -> list[Record]:
    """Return what a share reaches where nothing differs: the same cell under every control, of any model."""
    if record is None:
        return []
    keys = [k for k in (*MAIN, *CELL) if k in record.params]
    found = view.pair.select("rq4", quantity=record.quantity, site=record.site)
    same = [
        r for r in found if r.control != "none" and all(r.params.get(k) == record.params[k] for k in keys)
    ]
    return [r for r in same if r.params.get("of") == record.params.get("of")]


def churn(view: View, floor_from: str = "label_swap") -> tuple[Record | None, list[Record], Verdict]:
    """Return the churn of a pair beyond a floor, its controls and what may be said."""
    about = {"quantity": "churn", "control": "none", "model": "pair", "of": None, **family(view)}
    r = view.pair.one("rq4", rule="bound", floor_from=floor_from, **about)
    beside = nulls(view, r)
    return r, beside, judge(r, beside)


def _rows(view: View, quantity: str) -> list[Record]:
    """Return the records of a quantity to list: one per floor, share or group; of ranks that of 20."""
    found = [
        r
        for r in view.pair.select("rq4", quantity=quantity, control="none", site=None)
        if r.params.get("floor_from") != "curve"
        and not {"head", "edge"} & set(r.params)
        and r.params.get("group") in (None, "all")
    ]
    ranks = [r for r in found if r.params.get("k") is not None]
    middle = [r for r in ranks if r.params["k"] == 20] or ranks[-1:]
    return [r for r in found if r.params.get("k") is None] + middle


def _shares(view: View) -> list[Table]:
    rows: list[list[Cell]] = []
    for quantity, (said, claims) in SHARES.items():
        for r in _rows(view, quantity):
            beside = nulls(view, r)
            cell: list[Inline] = []
            for c in beside[:3]:
                halves = (c.control, c.model) == ("split_half", "pair")
                name = "split half (base and tuned)" if halves else named(c)
                cell += ["; " if cell else "", f"{name} ", view.number(c)]
            kept = [f"{words(k)} {words(r.params[k])}" for k in KEPT if r.params.get(k) is not None]
            kept += [] if r.model == "pair" else [r.model, words(r.params.get("baseline"))]
            about = ", ".join([*kept, *map(words, r.flags)])
            verdict = mark(judge(r, beside)) if claims and beside else DASH
            rows.append(
                [
                    [f"{said}: {about}" if about else said],
                    [view.number(r)],
                    cell or [DASH],
                    [verdict],
                    [count(r)],
                ]
            )
    head = ["quantity", "value", "controls", "beyond controls", "n"]
    return [Table("The heads as a whole.", head, rows, detail=True)] if rows else []


def takeaway(view: View) -> Takeaway:
    """Say whether more heads changed than where nothing differs."""
    r, beside, verdict = churn(view)
    if r is None:
        return Takeaway(verdict, ["No churn was measured."])
    main = family(view)
    how = ", ".join(words(main[k]) for k in MAIN if main.get(k))
    parts: list[Inline] = [f"Churn ({how}), the share of heads beyond what swapped labels reach, is "]
    parts += [*view.sentence(r, beside), f": {verdict.words} ({verdict.why})."]
    found = changes(view)
    top = sorted(found, key=lambda at: -abs(found[at].value or 0.0))[:3]
    if top:
        parts.append(f" The largest changes are those of heads {', '.join(f'{a}.{h}' for a, h in top)}.")
    return Takeaway(verdict, parts)


def headline(view: View) -> list[Inline]:
    """Write the summary's line on heads."""
    r, beside, verdict = churn(view)
    return ["churn ", *view.sentence(r, beside), f", {verdict.words}"]
