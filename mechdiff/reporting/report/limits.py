"""How far the numbers reach: robustness, limitations counted from the records, and reuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mechdiff.reporting.cells import layer
from mechdiff.reporting.report import handle, use
from mechdiff.reporting.report.content import Cell, Panel, Section, Table, Text
from mechdiff.reporting.report.runs import QUESTIONS, Study
from mechdiff.reporting.report.setup import mass
from mechdiff.reporting.report.verdict import judge, words
from mechdiff.reporting.report.view import View, count
from mechdiff.reporting.report.where import BEHAVIOURS, behaviour
from mechdiff.results import Record, apart

FLAGS = {
    "chosen_on_eval": "the prompts that layers were chosen on include those that are reported on",
    "rankings_disagree": "divergence and patching rank the layers differently",
    "unaligned_prompts": "some prompts had no aligned position and were left out",
    "lambda_at_edge": "the best ridge strength lies at the edge of the grid",
    "unbounded_interval": "resampling could not bound an end of the interval",
    "beyond_bound": "a side effect exceeds its bound",
    "within_random": "random subspaces do as much on the same prompts",
    "no_random_control": "no random subspaces stand beside it, so nothing is claimed",
    "few_draws": "fewer than 100 random subspaces stand beside it, so nothing is claimed",
    "not_chosen": "the run chose no handle of this kind, and a default one was used",
    "cut_answers": "answers end where the other model cannot follow",
    "disagrees_with_graded": "generated and graded behaviour contradict each other",
    "grows_with_n": "the older rule of churn, which every head passes with enough prompts",
    "completeness_missed": "integrated gradients of the layer do not add up",
    "ranked_on_the_same_prompts": "the order of heads was chosen on the prompts it is tried on",
    "norm_after_attention": "a norm after attention makes a head's contribution depend on the others",
    "layers_without_softmax_heads": "layers without softmax heads were left out",
    "one_sibling_per_class": "one tuned model of a kind cannot speak for the kind",
    "not_paired": "values by prompt were not kept, so two runs count as independent",
    "shared_rows": "embeddings were exchanged for shared tokens only",
    "no_stereotyped_answer": "some items have no stereotyped answer and were left out of bias scores",
}
"""What each flag of `docs/records.md` means, in words."""


def robustness(views: Sequence[View]) -> Section:
    """Write transfer between languages and wrappings, and what masking changes."""
    found = Section("robustness", "Robustness")
    for view in views:
        panel = Panel(view.name)
        if view.has("rq3"):
            panel.blocks += use.transfer(view)
        rows: list[list[Cell]] = []
        for r in view.pair.select("rq1", control="none", model="pair", masking=False):
            pairs = view.pair.select("rq1", quantity=r.quantity, control="none", model="pair", masking=True)
            masked = next((m for m in pairs if {**m.params, "masking": False} == r.params), None)
            if (
                masked is not None
                and r.quantity in BEHAVIOURS
                and r.value is not None
                and masked.value is not None
            ):
                moved = _moved(r, masked)
                rows.append([[behaviour(r)], [view.number(r)], [view.number(masked)], [moved], [count(r)]])
        if rows:
            head = ["tuned − base", "all tokens", "shared tokens only", "changed by masking", "n"]
            panel.blocks.append(
                Table(
                    f"{view.name}: what turning the fairness mask on changes; each column is the "
                    "other's control.",
                    head,
                    rows,
                    detail=True,
                )
            )
            moved_ = sum(row[3][0] == "yes" for row in rows)
            panel.blocks.append(
                Text(
                    [
                        f"Turning masking on changes {moved_} of {len(rows)} behaviours beyond their "
                        "intervals."
                    ],
                    kind="item",
                )
            )
        if panel.blocks:
            found.panels.append(panel)
    if not found.panels:
        found.blocks.append(
            Text(["Neither transfer between languages and wrappings nor masking was measured."])
        )
    return found


def _moved(free: Record, masked: Record) -> str:
    """Say whether masking moves a number: whether the intervals lie apart."""
    moved = {True: "yes", False: "no: the intervals overlap", None: "– an interval is missing"}
    return moved[apart(free, masked)]


def limitations(study: Study, views: Sequence[View]) -> Section:
    """Write what bounds these numbers, counted from the records."""
    found = Section("limitations", "Limitations")
    if study.quick:
        found.blocks.append(
            Text(
                [
                    "This is a quick study: few prompts and a reduced sweep. It shows that "
                    "everything runs, and its intervals are wide; do not quote it."
                ],
                kind="item",
            )
        )
    for view in views:
        records = [r for r in view.pair.records() if r.control == "none"]
        sizes = [r.n for r in records if r.n and r.low is not None]
        if sizes:
            found.blocks.append(
                Text(
                    [
                        f"{view.name}: {len(sizes):,} estimates with an interval, on {min(sizes):,} "
                        f"to {max(sizes):,} prompts; {sum(n < 30 for n in sizes):,} of them rest on "
                        "fewer than 30."
                    ],
                    kind="item",
                )
            )
        reasons = Counter(words(r.reason) for r in records if r.value is None)
        if reasons:
            told = ", ".join(f"{reason} ({n:,})" for reason, n in reasons.most_common())
            found.blocks.append(Text([f"{view.name}: not measurable: {told}."], kind="item"))
        found.blocks += _flags(view)
        lost = max(mass(view), key=lambda r: r.value or 0, default=None)
        if lost is not None:
            about = " ".join(str(lost.params[k]) for k in ("lang", "label", "benchmark") if k in lost.params)
            found.blocks.append(
                Text(
                    [
                        f"{view.name}: lost mass reaches ",
                        view.number(lost),
                        f" (n = {lost.n:,}; {lost.model} {about}): divergences speak of the rest.",
                    ],
                    kind="item",
                )
            )
        for question in view.pair.missing:
            found.blocks.append(
                Text(
                    [
                        f"{view.name}: {question} ({QUESTIONS[question]}) has no run, and nothing "
                        "here speaks of it."
                    ],
                    kind="item",
                )
            )
    found.blocks += [
        Text(
            [
                "Refusals are recognised by patterns and by the log-odds of written openings, which "
                "miss refusals worded otherwise."
            ],
            kind="item",
        ),
        Text(
            [
                "Intervals resample prompts: they speak for prompts like these, not for new topics; "
                "and for one trained sibling per class, not for a class of models."
            ],
            kind="item",
        ),
        Text(
            ["Where tokenizers differ the earliest layers stay hard to compare; only aligned positions are."],
            kind="item",
        ),
    ]
    return found


def _flags(view: View) -> list[Text]:
    found: dict[str, list[Record]] = {}
    for r in view.pair.records():
        for flag in r.flags:
            found.setdefault(flag, []).append(r)
    parts = []
    for flag, records in sorted(found.items()):
        sites = {r.site for r in records if r.site}
        layers = sorted({layer(s) for s in sites if s.rpartition(".")[2].isdigit()})
        told = [", ".join(dict.fromkeys(words(r.params["edit"]) for r in records if "edit" in r.params))]
        told.append(f"layers {', '.join(map(str, layers))}" if layers else "")
        about = "; ".join(filter(None, told))
        parts.append(f"{FLAGS.get(flag, words(flag))}{f' ({about})' if about else ''}")
    return [Text([f"{view.name}: flagged: {'; '.join(parts)}."], kind="item")] if parts else []


def reuse(views: Sequence[View]) -> Section:
    """Write where to monitor, which handle to use and what a gate saves."""
    found = Section("reuse", "Reuse for practitioners")
    for view in views:
        if not view.has("rq3"):
            found.blocks.append(
                Text([f"{view.name}: no handle was measured, so none can be recommended."], kind="item")
            )
            continue
        probes = use.monitor(view)
        if probes:
            probe = probes[-1]
            shuffled = view.controls(probe, ["shuffled"])
            verdict = judge(probe, shuffled)
            where = ", ".join(str(layer(str(r.site))) for r in probes)
            several = f"at any of layers {where}, which no prompt here tells apart" if len(probes) > 1 else ""
            found.blocks.append(
                Text(
                    [
                        f"{view.name}: monitor {several or f'at layer {where}'}: a linear probe "
                        "separates the classes (the layer was picked on these very prompts) with AUROC ",
                        *view.sentence(probe, shuffled),
                        f"; {verdict.words}.",
                    ],
                    kind="item",
                )
            )
        best, verdict = handle.best(view)
        if best is not None and verdict.found:
            about = (
                f"rank {best.params.get('k')}, {best.params.get('edit')}, α = "
                f"{best.params.get('alpha')}, {best.site}"
            )
            found.blocks.append(
                Text(
                    [
                        f"{view.name}: the handle to use: {about}; recovery ",
                        *view.sentence(best, handle.random_draws(view, best)),
                        ".",
                    ],
                    kind="item",
                )
            )
        elif best is not None:
            found.blocks.append(
                Text(
                    [f"{view.name}: no handle can be recommended: {verdict.words} ({verdict.why})."],
                    kind="item",
                )
            )
        found.blocks += use.gate(view)
    return found
