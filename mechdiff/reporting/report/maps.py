"""RQ2 of the report: whether a linear map carries base's states to tuned's, and whether these act."""

from __future__ import annotations

from collections.abc import Sequence

from mechdiff.reporting.cells import find, layer, sites_of
from mechdiff.reporting.report.charts import Series, line_chart
from mechdiff.reporting.report.content import Cell, Chart, Inline, Panel, Section, Table, Takeaway
from mechdiff.reporting.report.verdict import Verdict, judge, words
from mechdiff.reporting.report.view import View, count, mark, span
from mechdiff.reporting.report.where import proposed
from mechdiff.results import Record

CONTROLS = ("mean_shift", "shuffled")
METHOD = (
    "Linear maps base → tuned per layer (ridge by default), fitted on one set of prompts and tested "
    "on another. R² of "
    "the difference is "
    "1 − Σ|tuned − mapped|² / Σ|tuned − base|²: the identity map has 0, a perfect map 1. Controls: "
    "adding the mean "
    "difference alone (mean shift) and the same solver on shuffled rows. Then base's state is put "
    "into tuned, raw and "
    "mapped: KL(tuned ‖ patched) says whether a mapped state acts as the real one."
)


def section(views: Sequence[View]) -> Section:
    """Write the section on all pairs."""
    found = Section("rq2", "RQ2 — Transportability: does a linear map carry base to tuned?", [METHOD])
    for view in views:
        if view.has("rq2"):
            found.panels.append(_panel(view))
    return found


def cell(
    view: View, quantity: str, site: str, positions: str = "last", control: str = "none"
) -> Record | None:
    """Return one cell of the map question, None if it was not measured."""
    return find(view.pair.runs["rq2"].results, quantity, site, positions, control)


def site_of(view: View) -> str | None:
    """Return the site to speak of: the deepest one fitted, of those that RQ1 hands on if there are any."""
    sites = [s for s in sites_of(view.pair.runs["rq2"].results, ["r2_delta", "r2"]) if "." in s]
    handed = [s for s in sites if s in {str(r.site) for r in proposed(view)}]
    return max(handed or sites, key=layer, default=None)


def _panel(view: View) -> Panel:
    panel = Panel(view.name)
    sites = sites_of(view.pair.runs["rq2"].results, ["r2_delta", "kl_raw"])
    rows: list[list[Cell]] = []
    acts: list[list[Cell]] = []
    for site in sites:
        beside = [cell(view, "r2_delta", site, control=c) for c in CONTROLS]
        label = f"layer {layer(site)}" if site.startswith("resid_post") else site
        rows.append(view.row(label, cell(view, "r2_delta", site), beside))
        raw, mapped, meant = (
            cell(view, "kl_raw", site),
            cell(view, "kl_mapped", site),
            cell(view, "kl_mapped", site, control="mean_shift"),
        )
        agreement = cell(view, "patch_agreement", site)
        cells = [[view.number(r)] for r in (raw, mapped, meant, agreement)]
        acts.append([[label], *cells, [mark(_acting(view, site))], [count(raw)]])
    head = ["site", "R² of the difference", *map(words, CONTROLS), "beyond controls", "n"]
    panel.blocks += _chart(view, sites)
    panel.blocks.append(
        Table("How much of tuned − base the map explains, last position, held-out prompts.", head, rows)
    )
    if any(cell(view, "kl_raw", site) for site in sites):
        head = [
            "site",
            "KL raw (nats)",
            "KL mapped",
            "KL mean shift",
            "agreement in base",
            "mapped beats mean shift",
            "n",
        ]
        panel.blocks.append(
            Table(
                "Whether a mapped state acts inside tuned as tuned's own, last position.",
                head,
                acts,
                detail=True,
            )
        )
    panel.blocks += takeaways(view)
    return panel


def _chart(view: View, sites: Sequence[str]) -> list[Chart]:
    records = [r for s in sites if (r := cell(view, "r2_delta", s))]
    points = view.points(records)
    if not points:
        return []
    series = [Series("fitted map", points, 1)]
    for colour, control in enumerate(CONTROLS, 2):
        beside = view.points([r for s in sites if (r := cell(view, "r2_delta", s, control=control))])
        series += [Series(words(control), beside, colour, line=False)] if beside else []
    label = f"{view.name}: R squared of the difference by layer, with controls"
    svg = line_chart(label, series, "layer", "R² of the difference", ticks=[p.x for p in points])
    fits = Chart(
        svg,
        "What the map explains of the difference; the identity map has 0. Band: 95 % interval, n = "
        f"{span(records)}.",
    )
    return [fits, *_patches(view, sites)]


def _patches(view: View, sites: Sequence[str]) -> list[Chart]:
    """Draw what base's state costs tuned, as it is, mapped, and shifted by the mean."""
    arms = (
        ("kl_mapped", "none", "mapped"),
        ("kl_raw", "none", "raw"),
        ("kl_mapped", "mean_shift", "mean shift"),
    )
    found = {
        said: [r for s in sites if (r := cell(view, quantity, s, control=control))]
        for quantity, control, said in arms
    }
    series = [
        Series(said, view.points(rs), i, line=said == "mapped")
        for i, (said, rs) in enumerate(found.items(), 1)
    ]
    if not series[0].points:
        return []
    label = f"{view.name}: divergence of tuned patched with base's state, raw and mapped, by layer"
    svg = line_chart(
        label,
        [s for s in series if s.points],
        "layer",
        "KL(tuned ‖ patched), nats",
        ticks=[p.x for p in series[0].points],
    )
    return [
        Chart(
            svg,
            "What base's state costs tuned at the last position; 0 is tuned itself. Band: 95 % "
            f"interval, n = {span(found['mapped'])}.",
        )
    ]


def verdicts(view: View) -> tuple[str | None, Verdict, Verdict]:
    """Return the site spoken of, and whether its map explains more, and acts better, than its controls."""
    site = site_of(view)
    if site is None:
        return None, judge(None), judge(None)
    beside = [cell(view, "r2_delta", site, control=c) for c in CONTROLS]
    fits = judge(cell(view, "r2_delta", site), beside)
    return site, fits, _acting(view, site)


def _acting(view: View, site: str) -> Verdict:
    """Judge whether mapped states act better than the mean shift."""
    reduction, shift = (cell(view, "kl_reduction", site, control=c) for c in ("none", "mean_shift"))
    if shift is not None:
        return judge(reduction, [shift])
    mapped, meant = (cell(view, "kl_mapped", site, control=c) for c in ("none", "mean_shift"))
    return judge(mapped, [meant], side="below")


def takeaways(view: View) -> list[Takeaway]:
    """Say whether the map explains the difference and, apart from that, whether its states act."""
    site, fits, acts = verdicts(view)
    if site is None:
        return [Takeaway(fits, ["No map was tested."])]
    fitted = cell(view, "r2_delta", site)
    beside = [r for c in CONTROLS if (r := cell(view, "r2_delta", site, control=c))]
    parts: list[Inline] = [f"At layer {layer(site)} the map explains ", *view.sentence(fitted, beside)]
    found = [Takeaway(fits, [*parts, f" of tuned − base; {fits.why}."])]
    mapped, meant = (cell(view, "kl_mapped", site, control=c) for c in ("none", "mean_shift"))
    reduction, shift = (cell(view, "kl_reduction", site, control=c) for c in ("none", "mean_shift"))
    if reduction is not None:
        parts = [f"As a patch at layer {layer(site)}, the map removes "]
        parts += view.sentence(reduction, [shift] if shift else [])
        parts.append(" of the divergence that base's raw state causes")
        found.append(Takeaway(acts, [*parts, f"; {acts.why}."]))
    elif mapped is not None:
        parts = [f"As a patch at layer {layer(site)}, a mapped state leaves KL ", *view.sentence(mapped)]
        if meant is not None:
            parts += [" where the mean shift leaves ", view.number(meant)]
        found.append(Takeaway(acts, [*parts, f"; {acts.why}."]))
    return found


def headline(view: View) -> list[Inline]:
    """Write the summary's line on transportability."""
    site, fits, _ = verdicts(view)
    if site is None:
        return ["no map was tested"]
    r2, delta, agreement = (cell(view, q, site) for q in ("r2", "r2_delta", "patch_agreement"))
    parts: list[Inline] = ["R² = ", *view.sentence(r2), ", of the difference ", *view.sentence(delta)]
    parts += [f" at layer {layer(site)}: {fits.words} beyond its controls; mapped ≈ real patch to "]
    beside = [r for c in CONTROLS if (r := cell(view, "patch_agreement", site, control=c))]
    return [*parts, *view.sentence(agreement, beside), f": {judge(agreement, beside).words}"]
