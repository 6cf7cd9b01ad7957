"""RQ1 of the report: where the models of a pair differ, and whether that is causal."""

from __future__ import annotations

from collections.abc import Sequence

from mechdiff.reporting.cells import layer
from mechdiff.reporting.divergence import curve
from mechdiff.reporting.report.charts import Series, line_chart
from mechdiff.reporting.report.content import (
    Cell,
    Chart,
    Inline,
    Panel,
    Section,
    Table,
    Takeaway,
    Text,
    joined,
)
from mechdiff.reporting.report.verdict import judge, words
from mechdiff.reporting.report.view import View, count, mark, span
from mechdiff.results import DISAGREE, Record, handed_on

BEHAVIOURS = {
    "refusal_rate": "refusals",
    "refusal_logodds": "log-odds of refusing (nats)",
    "mc_acc": "multiple choice",
    "exact_match": "problems solved",
    "logprob_correct": "log P(correct) (nats)",
    "bias_score": "bias score",
    "bits_per_byte": "bits per byte",
    "toxicity": "toxicity",
}
MAIN = ("refusal_rate", "mc_acc", "exact_match")
"""Behaviours that are printed; the others are on the page alone."""
CONTROLS = ("other_prompt", "random", "wrong_layer")
METHOD = (
    "Both models answer the same prompts and benchmarks. Linear CKA (debiased) compares their "
    "states layer by "
    "layer. Then base's state is put into tuned at one layer, at the last position before the "
    "answer: recovery "
    "1 − KL(base ‖ patched) / KL(base ‖ tuned) is 1 when tuned then continues as base does. "
    "Controls: the state "
    "change of another prompt, a random change of the same length, and the state of a wrong layer."
)


def section(views: Sequence[View]) -> Section:
    """Write the section on all pairs."""
    found = Section("rq1", "RQ1 — Baseline divergence: where do they differ?", [METHOD])
    for view in views:
        if view.has("rq1"):
            found.panels.append(_panel(view))
    return found


def _panel(view: View) -> Panel:
    panel = Panel(view.name)
    parts = {
        False: behaviours(view, MAIN),
        True: behaviours(view, tuple(q for q in BEHAVIOURS if q not in MAIN)),
    }
    for detail, found in parts.items():
        rows: list[list[Cell]] = []
        for label, base, tuned, difference in found:
            verdict = mark(judge(difference, null=0.0, side="either"))
            cells = [[view.number(r)] for r in (base, tuned, difference)]
            rows.append([[label], *cells, [verdict], [count(difference)]])
        head = ["behaviour", "base", "tuned", "tuned − base", "differs from 0", "n"]
        said = "Graded behaviour and fluency" if detail else "What each model does"
        caption = f"{said}, all tokens allowed. Control of a difference: 0, the pair against itself."
        panel.blocks += [Table(caption, head, rows, detail)] if rows else []
    panel.blocks += _charts(view)
    panel.blocks += _layers(view)
    panel.blocks.append(takeaway(view))
    return panel


def behaviours(
    view: View, quantities: Sequence[str] = tuple(BEHAVIOURS)
) -> list[tuple[str, Record | None, Record | None, Record | None]]:
    """Return label, base, tuned and their difference of behaviours, without masking."""
    found: list[tuple[str, Record | None, Record | None, Record | None]] = []
    for quantity in quantities:
        cells: dict[str, dict[str, Record]] = {}
        for r in view.pair.select("rq1", quantity=quantity, control="none"):
            if not r.params.get("masking") and "contrast" not in r.params:
                cells.setdefault(behaviour(r), {})[r.model] = r
        for label, cell in cells.items():
            if cell.get("base") and any(r.value is not None for r in cell.values()):
                found.append((label, cell["base"], cell.get("tuned"), cell.get("pair")))
    return found


def behaviour(r: Record) -> str:
    """Name a behaviour by all that tells it from others, such as the form of a benchmark; but for masking."""
    told = [words(v) for k, v in r.params.items() if k not in ("masking", "direction")]
    return " ".join([BEHAVIOURS[r.quantity], *told])


def proposed(view: View) -> list[Record]:
    """Return the layers handed on: where states differ most or, if patching disagrees, the effect enters."""
    return handed_on(view.pair.select("rq1"))


def recovery(view: View, site: str | None, positions: str = "last") -> Record | None:
    """Return how far base's state at a site makes tuned continue as base, on the prompts of its controls."""
    about = {"quantity": "patch_recovery", "control": "none", "model": "pair", "positions": positions}
    tried = view.pair.select("rq1", site=site, direction="into_tuned", **about)
    return next((r for r in tried if r.params.get("prompts") == "all"), next(iter(tried), None))


def takeaway(view: View) -> Takeaway:
    """Say which layers to probe, and whether patching them does what their controls do not."""
    layers = proposed(view)
    names = " and ".join(f"{r.value:.0f}" for r in layers) or "none"
    tried = [(r, recovery(view, r.site)) for r in layers]
    judged = [(r, found, view.controls(found, CONTROLS)) for r, found in tried]
    verdicts = [judge(found, controls) for _, found, controls in judged]
    if not judged:
        return Takeaway(judge(None), ["No layer is proposed."])
    best = next((i for i, v in enumerate(verdicts) if v.found), 0)
    r, found, controls = judged[best]
    parts: list[Inline] = [f"Probe layers {names} in RQ2–RQ4. At layer {r.value:.0f} base's state recovers "]
    parts += [*view.sentence(found, controls), f"; {verdicts[best].why}."]
    if any(DISAGREE in r.flags for r in layers):
        parts.append(
            " Divergence and patching rank the layers differently: these are where the effect enters."
        )
    return Takeaway(verdicts[best], parts)


def _charts(view: View) -> list[Chart]:
    results = view.pair.runs["rq1"].results
    found = []
    marks = [(float(r.value or 0), f"proposed: layer {r.value:.0f}") for r in proposed(view)]
    plain = view.points(curve(results, "cka_debiased"), 1.0)
    centred = view.points(curve(results, "cka_debiased", centred=True), 1.0)
    if plain:
        series = [Series("debiased", plain, 1), Series("within class and language", centred, 2)]
        series = [s for s in series if s.points]
        label = f"{view.name}: divergence of states, 1 minus debiased CKA, by layer"
        svg = line_chart(label, series, "layer", "1 − CKA", ticks=_ticks(plain), marks=marks)
        n = span(curve(results, "cka_debiased"))
        found.append(
            Chart(
                svg,
                f"Divergence of states by layer. Bands: 95 % jackknife intervals, n = {n}. Vertical "
                "lines: layers handed on.",
            )
        )
    about = {"quantity": "patch_recovery", "model": "pair", "direction": "into_tuned", "positions": "last"}
    records = view.pair.select("rq1", control="none", prompts="curve", **about)
    points = view.points(records)
    if points:
        series = [Series("base's state", points, 1)]
        for colour, control in enumerate(CONTROLS, 2):
            beside = view.points(view.pair.select("rq1", control=control, prompts="all", **about))
            series += [Series(words(control), beside, colour, line=False)] if beside else []
        label = f"{view.name}: recovery of base's next token by layer of the patch"
        svg = line_chart(label, series, "layer of the patch", "recovery", ticks=_ticks(points), marks=marks)
        found.append(
            Chart(
                svg,
                "What a patch of one layer recovers of base, last position. Bands: 95 % intervals, "
                f"n = {span(records)} {records[0].split} prompts; controls on eval prompts.",
            )
        )
    return found


def _ticks(points: Sequence[object]) -> list[float]:
    layers = sorted({p.x for p in points})  # type: ignore[attr-defined]
    return layers[:: max(1, -(-len(layers) // 8))]


def _layers(view: View) -> list[Table | Text]:
    rows: list[list[Cell]] = []
    for r in proposed(view):
        found = recovery(view, r.site)
        beside = [next(iter(view.controls(found, [name])), None) for name in CONTROLS]
        cka = next(
            (c for c in curve(view.pair.runs["rq1"].results, "cka_debiased") if c.site == r.site), None
        )
        rows.append(view.row(f"layer {layer(str(r.site))}", found, beside, [view.number(cka)]))
    blocks: list[Table | Text] = []
    if rows:
        head = ["proposed", "recovery", *map(words, CONTROLS), "beyond all controls", "CKA (debiased)", "n"]
        blocks.append(Table("Layers handed on to RQ2–RQ4, and the cross-model patch there.", head, rows))
    onsets = view.pair.select("rq1", quantity="patch_onset", model="pair", positions="last")
    if onsets:
        said = [
            [
                f"{words(r.params.get('direction'))} {'layer ' if r.value is not None else ''}",
                view.number(r),
                f" (n = {r.n:,})",
            ]
            for r in onsets
        ]
        parts: list[Inline] = ["First layer with an effect above the floor, by direction: "]
        for i, one in enumerate(said):
            parts += [*(["; "] if i else []), *one]
        blocks.append(Text([*parts, "."]))
    return blocks


def headline(view: View) -> list[Inline]:
    """Write the summary's line on behaviour and divergence."""
    wanted = {"refusal_rate": "target", "exact_match": "", "mc_acc": ""}
    parts: list[Inline] = []
    for label, _, _, difference in behaviours(view):
        if difference is None or difference.value is None or difference.quantity not in wanted:
            continue
        if wanted[difference.quantity] not in (difference.params.get("label", ""), ""):
            continue
        parts += joined([label, view.number(difference)], " ")
        parts += [f" (n = {difference.n}, {judge(difference, null=0.0, side='either').words}); "]
    peak = view.pair.one("rq1", quantity="chosen_layer", by="cka_debiased", rank=1)
    if peak is not None:
        parts += ["states differ most at layer ", view.number(peak), f" (n = {peak.n})"]
    return parts or ["no behaviour was measured"]
