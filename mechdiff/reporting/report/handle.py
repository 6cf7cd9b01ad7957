"""RQ3 of the report: how small the causal handle is, and what it does beside its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdiff.reporting.cells import layer
from mechdiff.reporting.report.charts import Series, line_chart, slider
from mechdiff.reporting.report.content import (
    Cell,
    Chart,
    Inline,
    Panel,
    Section,
    Table,
    Takeaway,
    Text,
    interval,
    shown,
)
from mechdiff.reporting.report.use import yardsticks
from mechdiff.reporting.report.verdict import NO_RANDOM, WITHIN_RANDOM, Verdict, judge, words
from mechdiff.reporting.report.view import View, count, mark, span
from mechdiff.reporting.steering import DRAWS, EDITS, handle_site
from mechdiff.results import Record, is_own

SHOWN = ("mapped", "interchange", "add")
"""Edits of base in the order in which they are spoken of: mapped needs no tuned model."""
CONTROLS = ("other_prompt", "wrong_layer", "label_swap", "base_vs_base")
MINIMAL = {"minimal_k_10": "10 %", "minimal_k_20": "20 %", "minimal_k_90": "90 % of the full interchange"}
METHOD = (
    "A rank-k subspace is fitted to tuned − base. In base it is steered towards tuned's own state "
    "(interchange) or "
    "towards the one a linear map predicts (mapped, which needs no second model). α is chosen on "
    "dev prompts as the "
    "one with the largest effect among those whose side effects on neutral prompts hold (at most "
    "5 pp of answers turned and 5 % more bits per "
    "byte, one-sided bounds), and so is the rank of the chosen handle; it is then tested once on eval "
    "prompts. Only the slider shows dev prompts. Control: random subspaces of the same "
    "rank in edits as long, each at its best strength, whose 95th percentile an effect must exceed."
)


def section(views: Sequence[View]) -> Section:
    """Write the section on all pairs."""
    found = Section("rq3", "RQ3 — Causal control: how small is the handle?", [METHOD])
    for view in views:
        if view.has("rq3"):
            found.panels.append(_panel(view))
    return found


def solver(view: View) -> object:
    """Return the solver of the chosen handle, else the one with most tested cells."""
    chosen = chosen_handle(view)
    if chosen is not None and chosen.params.get("solver"):
        return chosen.params["solver"]
    found = [
        r.params.get("solver")
        for r in _all(view, "interchange_recovery", "eval")
        if r.params.get("edit") == "interchange"
    ]
    return max(dict.fromkeys(found), key=found.count, default=None)


def chosen_handle(view: View) -> Record | None:
    """Return the record of the chosen handle; of several the mapped one, which needs no tuned model."""
    found = {
        r.params.get("edit"): r for r in view.pair.select("rq3", quantity="chosen_handle", control="none")
    }
    held = [found[edit] for edit in SHOWN if edit in found]
    return next((r for r in held if r.value is not None), next(iter(held), None))


def measured(view: View, quantity: str, edit: str) -> dict[int, Record]:
    """Return the records of one edit by rank, as tested with the alpha chosen on dev."""
    own = solver(view) if edit != "add" else None
    found: dict[int, Record] = {}
    for r in _all(view, quantity, "eval"):
        if r.params.get("edit") == edit and (own is None or r.params.get("solver") in (own, None)):
            found.setdefault(int(r.params["k"]), r)
    return dict(sorted(found.items()))


def random_draws(view: View, record: Record | None) -> list[Record]:
    """Return the random subspaces that an effect has to exceed."""
    if record is None:
        return []
    found = [
        r
        for r in view.pair.select("rq3", quantity=record.quantity, control="random", split=record.split)
        if r.site == record.site and r.params.get("k") == record.params.get("k")
    ]
    return [r for r in found if r.params.get("edit") == record.params.get("edit")]


def against_random(record: Record | None, beside: Sequence[Record]) -> Verdict:
    """Judge an effect against random subspaces, on the prompts that these were given."""
    same = next((r for r in beside if r.params.get("handle")), None)
    if record is None or same is None:
        return judge(record, beside)
    few = replace(record, **same.params["handle"], n=same.n)
    found = judge(few, beside)
    if few.n == record.n or few.value is None:
        return found
    there = " ".join(filter(None, [shown(few, few.value), interval(few)]))
    return replace(found, why=f"{found.why}, on {few.n:,} prompts that both were given, where it is {there}")


def _all(view: View, quantity: str, split: str) -> list[Record]:
    if not view.has("rq3"):
        return []
    site = handle_site(view.pair.runs["rq3"].results)
    found = view.pair.select("rq3", quantity=quantity, control="none", split=split, site=site)
    return [r for r in found if r.params.get("edit") in EDITS and r.params.get("k") is not None and is_own(r)]


def _panel(view: View) -> Panel:
    panel = Panel(view.name)
    panel.blocks += _chart(view)
    rows: list[list[Cell]] = []
    for edit in SHOWN:
        costs = [measured(view, q, edit) for q in ("steer_effect", "side_effect_bpb", "side_effect_pp")]
        for k, r in measured(view, "interchange_recovery", edit).items():
            beside = random_draws(view, r)
            top = max(beside, key=lambda c: c.high if c.high is not None else c.value or 0, default=None)
            drawn: Cell = [view.number(top)] if top is None else [view.number(top), f" (n = {count(top)})"]
            cells: list[Cell] = [[view.number(r)], drawn, [mark(against_random(r, beside))]]
            cells += [[view.number(cost.get(k))] for cost in costs]
            alpha = r.params.get("alpha")
            said = "–" if alpha is None else f"{alpha:g}"
            rows.append([[f"{edit}, k\u00a0=\u00a0{k}"], [said], *cells, [count(r)]])
    if rows:
        head = [
            "handle",
            "α",
            "recovery",
            "random (95th)",
            "beyond random",
            "share of behaviour gap",
            "bits per byte",
            "neutral turned",
            "n",
        ]
        panel.blocks.append(
            Table(
                "Handles tested on eval prompts. Side effects are on neutral prompts, with upper bounds.",
                head,
                rows,
                detail=True,
            )
        )
    panel.blocks += [*_minimal(view), *_controls(view), *yardsticks(view)]
    panel.blocks.append(takeaway(view))
    return panel


def _chart(view: View) -> list[Chart]:
    final = {edit: measured(view, "interchange_recovery", edit) for edit in ("interchange", "mapped")}
    ks = sorted({k for found in final.values() for k in found})
    if not ks:
        return []
    series = [
        Series(f"{edit}, tested", [p for k, r in found.items() if (p := view.point(k, r))], colour)
        for colour, (edit, found) in enumerate(final.items(), 1)
    ]
    for number, (draw, said) in enumerate(DRAWS.items(), 3):
        site = handle_site(view.pair.runs["rq3"].results)
        found = view.pair.select(
            "rq3",
            quantity="interchange_recovery",
            control="random",
            split="eval",
            site=site,
            draw=draw,
            edit="interchange",
        )
        tops = [p for r in found if r.params.get("k") in ks and (p := view.point(r.params["k"], r))]
        raised = [p.__class__(p.x, p.y if p.high is None else p.high, title=p.title) for p in tops]
        series += (
            [Series(f"random, {said[1]}: 95th percentile", raised, number, line=False)] if raised else []
        )
    swept = [
        r
        for r in _all(view, "interchange_recovery", "dev")
        if r.params.get("alpha") and r.params["edit"] == "interchange"
    ]
    swept = [r for r in swept if r.params.get("solver") in (solver(view), None)]
    alphas = sorted({float(r.params["alpha"]) for r in swept})
    start = min(alphas, key=lambda a: abs(a - 1.0), default=1.0)
    for alpha in alphas:
        here = sorted((r for r in swept if r.params["alpha"] == alpha), key=lambda r: r.params["k"])
        points = [p for r in here if (p := view.point(r.params["k"], r))]
        series.append(Series("interchange on dev at the α of the slider", points, 5, group=alpha))
    label = f"{view.name}: recovery of tuned's next token by rank of the handle, with random subspaces"
    svg = line_chart(
        label, [s for s in series if s.points], "k (directions)", "recovery", ticks=ks, even=True, start=start
    )
    knob = slider("α of the dev curve", alphas, start) if len(alphas) > 1 else ""
    n = span([r for found in final.values() for r in found.values()])
    return [
        Chart(
            svg,
            f"Effect against rank at layer {layer(str(handle_site(view.pair.runs['rq3'].results)))}. "
            f"Bands: 95 % intervals, n = {n} eval prompts.",
            knob,
        )
    ]


def minimal(view: View, quantity: str, edit: str) -> Record | None:
    """Return the smallest rank that reaches a share of the effect."""
    found = [
        r
        for r in view.pair.select("rq3", quantity=quantity, control="none")
        if r.params.get("edit") in (edit, None)
    ]
    return next((r for r in found if r.split == "eval"), next(iter(found), None))


def _minimal(view: View) -> list[Text]:
    parts: list[Inline] = []
    for quantity, said in MINIMAL.items():
        for edit in ("interchange", "mapped"):
            r = minimal(view, quantity, edit)
            if r is not None and (edit == "interchange" or r.params.get("edit") == edit):
                parts += [
                    "; " if parts else "Smallest k that reaches ",
                    f"{said} ({edit}): ",
                    view.number(r),
                    f" (n = {r.n:,}{_claim(r)})",
                ]
    return [Text([*parts, "."])] if parts else []


def _claim(record: Record) -> str:
    """Say that nothing is claimed of a smallest rank which random subspaces reach, or too few were tried."""
    verdict = judge(record) if {WITHIN_RANDOM, NO_RANDOM} & set(record.flags) else None
    return "" if verdict is None or record.value is None else f"; {verdict.words}: {verdict.why}"


def _controls(view: View) -> list[Table]:
    """Write what the same edit does from elsewhere: another prompt, layer or class, and no second model."""
    rows: list[list[Cell]] = []
    for name in CONTROLS:
        found = view.pair.select("rq3", quantity="interchange_recovery", control=name, split="eval")
        for r in found:
            about = ", ".join(f"{k} = {r.params[k]}" for k in ("edit", "k") if r.params.get(k) is not None)
            rows.append([[f"{words(name)}: {about}"], [view.number(r)], [count(r)]])
    caption = "Other controls, each at the strength with its largest effect on dev prompts."
    return [Table(caption, ["control", "recovery", "n"], rows, detail=True)] if rows else []


def best(view: View) -> tuple[Record | None, Verdict]:
    """Return the recovery of the chosen handle, else of the largest interchange, and its verdict."""
    chosen = chosen_handle(view)
    if chosen is not None and chosen.value is not None:
        found = measured(view, "interchange_recovery", str(chosen.params.get("edit"))).get(int(chosen.value))
    else:
        ranks = measured(view, "interchange_recovery", "interchange")
        found = ranks[max(ranks)] if ranks else None
    return found, against_random(found, random_draws(view, found))


def takeaway(view: View) -> Takeaway:
    """Say how small the handle is, or that none was found."""
    found, verdict = best(view)
    if found is None:
        return Takeaway(verdict, ["No handle was tested."])
    k, edit = found.params.get("k"), found.params.get("edit")
    parts: list[Inline] = [f"The {edit} handle of rank {k} at layer {layer(str(found.site))} restores "]
    parts += view.sentence(found, random_draws(view, found))
    parts.append(f" of tuned's next token in base: {verdict.words} ({verdict.why}).")
    chosen = chosen_handle(view)
    if chosen is None or chosen.value is None:
        why = "no handle was chosen" if chosen is None else words(chosen.reason)
        parts.append(f" It is not the choice of dev prompts: {why}.")
    for quantity, said in (
        ("side_effect_bpb", "bits per byte"),
        ("side_effect_pp", "neutral answers turned"),
    ):
        cost = measured(view, quantity, str(edit)).get(int(k or 0))
        if cost is not None:
            parts += [f" Side effect, {said}: ", view.number(cost), f" (n = {cost.n:,})."]
    return Takeaway(verdict, parts)


def headline(view: View) -> list[Inline]:
    """Write the summary's line on the handle."""
    found, verdict = best(view)
    if found is None:
        return ["no handle was tested"]
    k, edit = int(found.params.get("k") or 0), str(found.params.get("edit"))
    parts: list[Inline] = [f"k = {k} ({edit}) at layer {layer(str(found.site))}: recovery "]
    parts += [*view.sentence(found, random_draws(view, found)), f", {verdict.words}"]
    steer, ablate = measured(view, "steer_effect", edit).get(k), ablation(view)
    if steer is not None:
        said = words(steer.params.get("metric", "graded behaviour"))
        parts += ["; steer ", view.number(steer), f" of the behaviour gap ({said}, n = {steer.n})"]
    if ablate is not None:
        parts += ["; ablate ", view.number(ablate), f" (n = {ablate.n})"]
    cost = measured(view, "side_effect_bpb", edit).get(k)
    if cost is not None:
        parts += ["; side effect ", view.number(cost), f" bits per byte (n = {cost.n})"]
    return parts


def ablation(view: View) -> Record | None:
    """Return how much of tuned's own change is lost when the chosen subspace is taken out of tuned."""
    chosen = view.pair.one("rq3", quantity="chosen_handle", edit="ablate")
    k = None if chosen is None or chosen.value is None else int(chosen.value)
    found = view.pair.select("rq3", quantity="ablate_effect", control="none", split="eval", edit="ablate")
    at = [r for r in found if r.params.get("k") == k] or found
    return next((r for r in at if r.params.get("metric") == "recovery"), next(iter(at), None))
