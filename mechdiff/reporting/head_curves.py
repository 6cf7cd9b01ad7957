"""Draw what heads do together: rankings compared, effects that add up, and estimates against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from mechdiff.errors import ConfigError
from mechdiff.reporting.divergence import DPI, WIDTH, caption, finish
from mechdiff.reporting.handles import GROUPS
from mechdiff.reporting.heads import HOW, NULLS, SAID, by_head, said
from mechdiff.reporting.panels import GREY, STYLE
from mechdiff.results import Record, Results

RANKINGS = {
    "topk_overlap": "Overlap of the k highest",
    "jaccard": "Jaccard index of the k highest",
    "rbo": "Rank-biased",
}
"""Quantities that compare two rankings of heads."""
_BLUE = "#0072B2"
_HALVES = {
    "base": (NULLS["split_half"][0], "base and base, other prompts"),
    "pair": ("D", "base and tuned, other prompts"),
}
_CHANCE: dict[str, Any] = {"color": GREY, "marker": "_", "markersize": 12, "markeredgewidth": 1.6}


def plot_head_overlap(results: Results, out: str | Path | None = None) -> Figure:
    """Draw how alike the two models rank their heads, with chance and halves of the prompts.

    Args:
        results: Table of a run on heads.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no ranking.
    """
    found = {q: results.select(question="rq4", quantity=q) for q in RANKINGS}
    found = {q: records for q, records in found.items() if records}
    if not found:
        raise ConfigError("nothing to draw: no record of topk_overlap; give the results.json of an rq4 run")
    main = {name: next(iter(found.values()))[0].params.get(name) for name in HOW}
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), dpi=DPI, layout="constrained")
        ratios = [1 if q == "rbo" else 2.2 for q in found]
        panels = figure.subplots(1, len(found), squeeze=False, sharey=True, width_ratios=ratios).ravel()
        for axes, (quantity, records) in zip(panels, found.items(), strict=True):
            _ranking(axes, [r for r in records if _same(r, main)])
            axes.set_title(RANKINGS[quantity])
        panels[0].set_ylabel("agreement (1 = the same heads)")
        panels[0].set_ylim(0, 1.05)
        style: dict[str, Any] = {"mfc": "white", "mec": "black", "mew": 0.8, "markersize": 4.5}
        handles = [
            Line2D([], [], color=_BLUE, marker="o", markersize=5, linestyle="none", label="base and tuned"),
            Line2D([], [], **_CHANCE, linestyle="none", label="chance, with its range"),
            *(
                Line2D([], [], marker=marker, linestyle="none", label=label, **style)
                for marker, label in _HALVES.values()
            ),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=7)
        n = next(r.n for records in found.values() for r in records if r.control == "none")
        more = "Heads ranked by the size of their mean effect. Lines: 95 % intervals over prompts; "
        more += "of halves and chance: 5th to 95th and 2.5th to 97.5th percentile."
        if any(r.control == "split_half" for records in found.values() for r in records):
            more += " Squares and diamonds: two random halves of the prompts, to be compared with each other."
        caption(figure, results, f"{said(main)}. n = {n} prompts. {more}")
        return finish(figure, out)


def plot_cumulative(results: Results, out: str | Path | None = None) -> Figure:
    """Draw the effect of the k highest heads together against random order, and the areas CPR and CMD.

    Args:
        results: Table of a run on heads.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no cumulative effect.
    """
    found = results.select(question="rq4", quantity="cumulative_effect", of="all_heads")
    if not found:
        raise ConfigError(
            "nothing to draw: no record of cumulative_effect; give the results.json of an rq4 run"
        )
    main = {name: found[0].params.get(name) for name in HOW}
    found = sorted((r for r in found if _same(r, main)), key=lambda r: r.params["k"])
    own = [r for r in found if r.control == "none"]
    heads = max(r.params["k"] for r in found)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 1))
        _band(left, [r for r in found if r.control == "random"], GREY, "random order", "--")
        _band(left, own, _BLUE, "highest first", "-")
        for y in (0, 1):
            left.axhline(y, color="black", linewidth=0.9, linestyle="-" if not y else ":")
        left.set_xscale("log")
        ks = [r.params["k"] for r in own]
        left.set_xticks(ks, [str(k) for k in ks])
        left.xaxis.set_minor_locator(NullLocator())
        left.set_xlabel(f"heads patched together, of {heads}")
        left.set_ylabel("share of the all-heads effect")
        left.set_title("How few heads have the effect of all")
        if reason := next((r.reason for r in own if r.value is None), None):
            left.text(
                0.5, 0.5, str(reason).replace("_", " "), transform=left.transAxes, ha="center", color=GREY
            )
            left.set_ylim(-0.1, 1.1)
        else:
            over: dict[str, Any] = {"frameon": True, "edgecolor": "none", "framealpha": 1}
            left.legend(fontsize=7, loc="best", **over)
        _areas(right, results, main)
        parts = [f"{said(main)}. n = {own[0].n} prompts."]
        for r in results.select(quantity="cumulative_effect", of="gap", control="none"):
            if r.value is not None and _same(r, main):
                ends = f" [{r.low:.2f}, {r.high:.2f}]" if r.low is not None and r.high is not None else ""
                whole = f"All heads together close {r.value:.2f}{ends} of the gap."
                parts.append(whole.replace("-", "−"))
        draws = next((r.params.get("draws") for r in found if r.control == "random"), None)
        lines = "Lines and bands: 95 % intervals over prompts"
        parts.append(f"{lines}; of random order: 90 % of {draws} draws." if draws else f"{lines}.")
        caption(figure, results, " ".join(parts))
        return finish(figure, out)


def plot_head_truth(results: Results, out: str | Path | None = None) -> Figure:
    """Draw the estimated against the exact effect of single heads, a panel per exchange.

    Args:
        results: Table of a run on heads with exact patches.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no exact effect.
    """
    exact = results.select(question="rq4", quantity="head_attribution", method="patch")
    exact = [r for r in exact if r.unit != "pp"]  # of a probability there is no estimate
    exchanges = list(dict.fromkeys((r.model, r.params["metric"], r.params["baseline"]) for r in exact))
    if not exchanges:
        raise ConfigError("nothing to draw: no head was patched; give the results.json of an rq4 run")
    with rc_context({**STYLE, "axes.grid.axis": "both"}):
        columns = 2 if len(exchanges) < 3 else 3
        rows = -(-len(exchanges) // columns)
        size = (WIDTH, 0.8 + rows * (4.1 if columns == 2 else 2.9))
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, exchange in zip(panels, exchanges, strict=False):
            _scatter(axes, results, *exchange)
        if len(exchanges) == 1:
            _scatter(panels[1], results, *exchanges[0], near=True)
        for axes in panels[max(len(exchanges), 2) :]:
            axes.remove()
        handles = [
            Line2D([], [], color=colour, marker="o", markersize=4, linestyle="none", label=label)
            for colour, label in GROUPS.values()
        ]
        handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="equal"))
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7)
        n = " to ".join(str(n) for n in sorted({min(r.n for r in exact), max(r.n for r in exact)}))
        metric = SAID.get(exchanges[0][1], exchanges[0][1])
        more = f"n = {n} prompts. [ ] and lines: 95 % intervals over prompts."
        overlaps = results.select(quantity="truth_overlap", control="none")
        if sizes := sorted({int(r.params["among"]) for r in overlaps if "among" in r.params}):
            more += f" Overlap: of ranks among the {' to '.join(map(str, sizes))} heads patched."
        if not results.select(quantity="head_attribution", subset="patched"):
            more += " Estimates may be over more prompts; r and overlap are over the same."
        caption(figure, results, f"Effect on the {metric}; truth: the head is patched. {more}")
        return finish(figure, out)


def _same(record: Record, main: dict[str, Any]) -> bool:
    return all(record.params.get(name) == value for name, value in main.items())


def _ranking(axes: Axes, records: Sequence[Record]) -> None:
    ks = sorted({r.params["k"] for r in records if "k" in r.params}) or [None]
    for r in records:
        x = float(ks.index(r.params.get("k")))
        if r.value is None:
            continue
        if r.control == "chance":
            if r.low is not None and r.high is not None:
                axes.bar(x, r.high - r.low, 0.5, bottom=r.low, color="#DDDDDD", zorder=0.8)
            axes.plot(x, r.value, **_CHANCE)
            continue
        half = r.control == "split_half"
        x += {"base": 0.18, "pair": 0.32}[r.model] if half else 0
        if r.low is not None and r.high is not None:
            axes.vlines(x, r.low, r.high, color="black" if half else _BLUE, linewidth=0.7 if half else 1.4)
        if half:
            marker = _HALVES[r.model][0]
            axes.plot(x, r.value, marker=marker, mfc="white", mec="black", mew=0.8, markersize=4.5)
        else:
            axes.plot(x, r.value, marker="o", color=_BLUE, markersize=5)
    axes.set_xlim(-0.6, len(ks) - 0.4)
    if ks == [None]:
        persistence = next((r.params.get("persistence") for r in records), None)
        axes.set_xticks([0], [f"p = {persistence:g}" if persistence else ""])
    else:
        axes.set_xticks(range(len(ks)), [str(k) for k in ks])
        axes.set_xlabel("k (heads)")


def _band(axes: Axes, records: Sequence[Record], colour: str, label: str, dash: str) -> None:
    held = [(r.params["k"], r.value, r.low, r.high) for r in records if r.value is not None]
    if not held:
        return
    x, y, *_ = zip(*held, strict=True)
    axes.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=3, linewidth=1.3, label=label)
    ends = [(k, low, high) for k, _, low, high in held if low is not None and high is not None]
    if ends:
        ks, low, high = zip(*ends, strict=True)
        axes.fill_between(ks, low, high, color=colour, alpha=0.18, linewidth=0)


def _areas(axes: Axes, results: Results, main: dict[str, Any]) -> None:
    for i, quantity in enumerate(("cpr", "cmd")):
        for r in results.select(question="rq4", quantity=quantity):
            if not _same(r, main):
                continue
            if r.value is None:
                axes.text(i, 0.02, str(r.reason).replace("_", " "), rotation=90, fontsize=6.5, color=GREY)
            elif r.control == "random":
                if r.low is not None and r.high is not None:
                    axes.vlines(i + 0.2, r.low, r.high, color="black", linewidth=0.7, zorder=3)
                axes.plot(i + 0.2, r.value, marker="v", mfc="white", mec="black", markersize=4.5, zorder=4)
            elif r.control == "none":
                axes.bar(i, r.value, 0.65, color=_BLUE, alpha=0.85)
                if r.low is not None and r.high is not None:
                    axes.vlines(i, r.low, r.high, color="black", linewidth=1.1, zorder=3)
    axes.axhline(0, color="black", linewidth=0.9)
    axes.set_xticks([0, 1], ["CPR\n(area under)", "CMD\n(area from 1)"], fontsize=7)
    axes.set_xlim(-0.6, 1.6)
    axes.set_title("Areas (▽ random order)")


def _scatter(
    axes: Axes, results: Results, model: str, metric: str, baseline: str, near: bool = False
) -> None:
    """Draw estimates against exact effects; ``near`` shows the range of the heads drawn at random alone."""
    where: dict[str, Any] = {"model": model, "metric": metric, "baseline": baseline}
    exact = by_head(results, quantity="head_attribution", method="patch", **where)
    guesses = [
        by_head(results, quantity="head_attribution", method=method, subset=subset, **where)
        for subset in ("patched", None)
        for method in ("attribution_patching", "grad_x_act", "integrated_gradients")
    ]
    estimate = next((cells for cells in guesses if cells), {})
    ends = [0.0]
    for place, r in exact.items():
        guess = estimate.get(place)
        if r.value is None or guess is None or guess.value is None:
            continue
        colour = GROUPS[r.params["group"]][0]
        if r.low is not None and r.high is not None:
            axes.vlines(guess.value, r.low, r.high, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(guess.value, r.value, marker="o", markersize=3.5, color=colour, alpha=0.85)
        if not near or r.params["group"] == "random":
            ends += [guess.value, r.value]
    edge = 0.06 * (max(ends) - min(ends) or 1.0)
    limits = (min(ends) - edge, max(ends) + edge)
    axes.plot(limits, limits, color="black", linewidth=0.8, linestyle=":", zorder=0.9)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_box_aspect(1)
    unit = next((r.unit for r in exact.values()), "")
    first = next((r for r in estimate.values()), None)
    method = SAID.get(first.params["method"], "estimate") if first else "no estimate"
    axes.set_xlabel(f"{method} ({unit})", fontsize=7.5)
    axes.set_ylabel(f"exact effect ({unit})", fontsize=7.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=7)
    if near:
        axes.set_title("The same, near 0", pad=24)
        return
    axes.set_title(f"{model}, {SAID.get(baseline, baseline)}", pad=24)
    lines = []
    for r in results.select(quantity="truth_r", group="all", control="none", **where):
        lines.append(f"r = {_with_ends(r)}")
    for r in results.select(quantity="truth_overlap", control="none", **where):
        lines.append(f"top-{r.params['k']} overlap = {_with_ends(r)}")
    axes.text(0, 1.03, "\n".join(lines), transform=axes.transAxes, fontsize=7)


def _with_ends(record: Record) -> str:
    if record.value is None:
        return str(record.reason).replace("_", " ")
    ends = "" if record.low is None or record.high is None else f" [{record.low:.2f}, {record.high:.2f}]"
    return f"{record.value:.2f}{ends}".replace("-", "−")
