"""The head of the report: its title, the summary of every question, and the pairs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from mechdiff.reporting.report import handle, heads, maps, where
from mechdiff.reporting.report.content import Cell, Inline, Section, Table, Takeaway, Text
from mechdiff.reporting.report.runs import QUESTIONS, Study
from mechdiff.reporting.report.verdict import judge, words
from mechdiff.reporting.report.view import View, count, mark
from mechdiff.results import Record

SEED_TITLE = "CultureShift vs CogShift: Tokenizer-Robust, Causal Model-Diffing With Cross-Layer Coding"


def title(study: Study) -> str:
    """Return the seed's title for a cultural and a cognitive pair, else one that names the pair."""
    domains = {str(pair.spec.get("domain", "")) for pair in study.pairs}
    if {"cultural", "cognitive"} <= domains:
        return SEED_TITLE
    return f"{study.contrast_name}: what tuning changed, where, and how small the handle is"


def missing(study: Study) -> Takeaway | None:
    """Name the questions without a run, None if there is none."""
    gone = [f"{q} of {pair.name} ({QUESTIONS[q]})" for pair in study.pairs for q in pair.missing]
    if not gone:
        return None
    return Takeaway(
        judge(None), [f"Not measured yet: {'; '.join(gone)}. The report speaks of what is there."]
    )


def summary(study: Study, views: Sequence[View]) -> Section:
    """Write the executive summary: one line per question and pair, and the contrast."""
    found = Section("summary", "Executive summary")
    lines = {
        "rq1": ("Baseline", where),
        "rq2": ("Transportability (CLT)", maps),
        "rq3": ("Causal handle", handle),
        "rq4": ("Heads", heads),
    }
    for question, (name, part) in lines.items():
        for view in views:
            said = (
                part.headline(view) if view.has(question) else [f"not measured: no {question} run was given"]
            )
            found.blocks.append(Text([f"{name}, {view.name}: ", *said, "."], kind="item"))
    if len(views) > 1:
        found.blocks.append(Text(["Contrast: ", *_contrast_line(study, views)], kind="item"))
    return found


def _contrast_line(study: Study, views: Sequence[View]) -> list[Inline]:
    parts: list[Inline] = []
    for view in views:
        chosen = handle.chosen_handle(view) if view.has("rq3") else None
        if chosen is None:
            parts.append(f"{view.name}: rank not measured; ")
            continue
        if chosen.value is None:
            parts += [
                f"{view.name}: no handle within the bounds: ",
                view.number(chosen),
                f" (n = {chosen.n:,}); ",
            ]
            continue
        verdict = handle.best(view)[1]
        said = "needs rank" if verdict.found else "has chosen, without more than random subspaces do, rank"
        parts += [f"{view.name} {said} k = ", view.number(chosen)]
        parts.append(f" (chosen on {chosen.n:,} dev prompts; on eval: {verdict.words}); ")
    for r in study.contrasts.select(quantity="churn_difference", control="none"):
        verdict = judge(r, null=0.0, side="either")
        said = f"{r.params.get('contrast', 'difference of pairs')}: churn differs by "
        parts += [said, cite_contrast(study, views, r), f" (n = {r.n:,}, control 0): {verdict.words}. "]
        return parts
    return [*parts, "churn of the pairs is not compared."]


def cite_contrast(study: Study, views: Sequence[View], r: Record) -> Inline:
    """Return a number of the comparison of pairs."""
    return views[0].cite(
        study.contrast_name, str(study.contrasts.provenance.get("file", "contrasts.json")), r
    )


def contrast(study: Study, views: Sequence[View]) -> Section:
    """Write the pairs side by side: layers, map, rank, churn; and the differences with their intervals."""
    found = Section("contrast", "Contrast of the pairs")
    rows: list[list[Cell]] = []

    def add(label: str, records: Sequence[Record | None]) -> None:
        if any(r is not None for r in records):
            n = " / ".join(count(r) for r in records)
            rows.append([[label], *([v.number(r)] for v, r in zip(views, records, strict=True)), [n]])

    add(
        "layer where states differ most",
        [v.pair.one("rq1", quantity="chosen_layer", by="cka_debiased", rank=1) for v in views],
    )
    add(
        "first layer with an effect (onset)",
        [
            v.pair.one("rq1", quantity="patch_onset", direction="into_tuned", positions="last", model="pair")
            for v in views
        ],
    )
    fitted = [maps.cell(v, "r2_delta", s) if v.has("rq2") and (s := maps.site_of(v)) else None for v in views]
    add("R² of the difference at the layer spoken of", fitted)
    add("rank of the chosen handle", [handle.chosen_handle(v) if v.has("rq3") else None for v in views])
    for quantity, said in handle.MINIMAL.items():
        add(f"smallest k reaching {said}", [handle.minimal(v, quantity, "interchange") for v in views])
    add("churn of heads", [heads.churn(v)[0] for v in views])
    if rows:
        found.blocks.append(
            Table("The pairs side by side.", ["quantity", *(v.name for v in views), "n"], rows)
        )
    differences: list[list[Cell]] = []
    for r in study.contrasts:
        if r.control == "none":
            label = f"{words(r.quantity)}, {r.params.get('contrast', 'first − second')}"
            if "handles" in r.params:
                label += f" ({' against '.join(reversed(r.params['handles']))})"
            differences.append(
                [
                    [label],
                    [cite_contrast(study, views, r)],
                    ["0"],
                    [mark(judge(r, null=0.0, side="either"))],
                    [count(r)],
                ]
            )
    if differences:
        head = ["difference", "value", "control", "differs from 0", "n"]
        found.blocks.append(Table("Differences of the pairs with their intervals.", head, differences))
    found.blocks.append(
        Text(
            [
                "One trained sibling per class: a difference between these pairs is one between "
                "these two siblings, not between cultural and cognitive tuning as such."
            ]
        )
    )
    return found
