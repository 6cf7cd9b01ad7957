"""Draw what single heads do in two models, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mechdiff.errors import ConfigError
from mechdiff.reporting.cells import layer
from mechdiff.reporting.divergence import DPI, WIDTH, caption, finish
from mechdiff.reporting.panels import GREY, STYLE
from mechdiff.results import Record, Results

Place = tuple[int, int]
"""Layer and head."""

HOW = ("method", "metric", "baseline")
"""Parameters that say how a head's effect was measured."""

SAID = {
    "attribution_patching": "attribution patching",
    "grad_x_act": "gradient × activation",
    "integrated_gradients": "integrated gradients",
    "logit_diff": "logit difference",
    "logprob_correct": "log P(correct)",
    "refusal_logodds": "log-odds of refusing",
    "kl_other": "KL to the other model",
    "twin": "twin prompt",
    "counterfactual": "counterfactual prompt",
    "other_model": "the other model",
}
NULLS = {"label_swap": ("v", "labels swapped"), "split_half": ("s", "halves of one model")}


def how(results: Results) -> dict[str, Any]:
    """Return the parameters of the main measurement: those of the first head, if possible of a difference.

    Raises:
        ConfigError: If the table holds no head.
    """
    found = results.select(question="rq4", quantity="head_attribution")
    found = [r for r in found if "head" in r.params and r.params["method"] != "patch"]
    found.sort(key=lambda r: r.model != "pair")
    if not found:
        raise ConfigError(
            "nothing to draw: no record of head_attribution; give the results.json of an rq4 run"
        )
    return {name: found[0].params.get(name) for name in HOW}


def by_head(results: Results, **where: Any) -> dict[Place, Record]:
    """Return records of single heads by place; controls or those of some prompts only where asked for."""
    found = results.select(question="rq4", **{"control": "none", "subset": None, **where})
    return {place_of(r): r for r in found if "head" in r.params}


def said(names: Mapping[str, Any]) -> str:
    """Say how heads were measured, such as ``Logit difference by attribution patching, twin prompt``."""
    method, metric, baseline = (SAID.get(str(names.get(n)), str(names.get(n))) for n in HOW)
    method, baseline = (name.replace("_", " ") for name in (method, baseline))
    return f"{metric[0].upper()}{metric[1:]} by {method}, baseline: {baseline}"


def plot_head_maps(results: Results, out: str | Path | None = None) -> Figure:
    """Draw layer by head maps of both models, their difference, and what changed in the heads themselves.

    Args:
        results: Table of a run on heads.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no head.
    """
    main = how(results)
    maps = {
        m: by_head(results, quantity="head_attribution", model=m, **main) for m in ("base", "tuned", "pair")
    }
    own = by_head(results, quantity="head_own_change", metric="norm", kind="own")
    first = next(r for cells in maps.values() for r in cells.values())
    grid = _extent([*maps.values(), own])
    with rc_context({**STYLE, "axes.grid": False}):
        height = min(max(2.0, 0.09 * grid[1] + 1.1), 4.2)
        figure = Figure(figsize=(WIDTH, 0.7 + 2 * height), dpi=DPI, layout="constrained")
        panels = figure.subplots(2, 2, squeeze=False).ravel()
        top = _scale([maps["base"], maps["tuned"]])
        for axes, model in zip(panels, ("base", "tuned"), strict=False):
            _map(figure, axes, maps[model], grid, top, first.unit)
            axes.set_title(f"What each head adds: {model}")
        _map(figure, panels[2], maps["pair"], grid, _scale([maps["pair"]]), first.unit)
        panels[2].set_title("Difference, tuned − base")
        _outline(panels[2], maps["pair"], floors_of(results))
        _map(figure, panels[3], own, grid, _scale([own], 1.0), next((r.unit for r in own.values()), ""))
        panels[3].set_title("Own change: same input, other weights")
        missed = {
            layer(str(r.site))
            for r in results.select(quantity="completeness_error")
            if "completeness_missed" in r.flags
        }
        more = [f"{said(main)}. n = {first.n} prompts, split {first.split}."]
        more += ["Squares: changed by more than swapped labels reach; dots: by more than the fixed floor."]
        if missed:
            more.append(
                f"Integrated gradients miss completeness in layers {', '.join(map(str, sorted(missed)))}."
            )
        caption(figure, results, " ".join(more))
        return finish(figure, out)


def _extent(maps: Sequence[Mapping[Place, Record]]) -> tuple[int, int]:
    places = [place for cells in maps for place in cells]
    return 1 + max(p for p, _ in places), 1 + max(h for _, h in places)


def _scale(maps: Sequence[Mapping[Place, Record]], level: float = 0.995) -> float:
    """Return the size at which the colours end: few heads are far larger than the rest."""
    sizes = sorted(abs(r.value) for cells in maps for r in cells.values() if r.value is not None)
    return sizes[math.ceil(level * len(sizes)) - 1] if sizes else 0.0


def _map(
    figure: Figure, axes: Axes, cells: Mapping[Place, Record], grid: tuple[int, int], top: float, unit: str
) -> None:
    """Draw a cell per layer and head; a head that was not measured is grey."""
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.set_facecolor("#E3E3E3")
    if not cells:
        axes.set_facecolor("white")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
        return
    values = [r.value for r in cells.values() if r.value is not None]
    signed = min(values, default=0.0) < 0 or unit != "fraction"
    end = top or 1.0
    shown = [[_value(cells.get((p, h))) for p in range(grid[0])] for h in range(grid[1])]
    style: dict[str, Any] = {"vmin": -end if signed else 0, "vmax": end}
    colours = "RdBu_r" if signed else "Purples"
    image = axes.imshow(shown, origin="lower", cmap=colours, aspect="auto", interpolation="nearest", **style)
    beyond = max(map(abs, values), default=0.0) > end
    bar = figure.colorbar(image, ax=axes, extend="both" if beyond and signed else "neither", pad=0.02)
    bar.set_label("‖change‖ / ‖tuned‖" if unit == "fraction" else unit, fontsize=7)
    bar.ax.tick_params(labelsize=6.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _value(record: Record | None) -> float:
    return math.nan if record is None or record.value is None else record.value


def lower_bound(record: Record) -> float:
    """Return the lower bound of a size."""
    if record.low is None or record.high is None:
        return 0.0
    return max(record.low, -record.high, 0.0)


def floors_of(results: Results) -> dict[str, float]:
    """Return the floors of the main measurement: ``seed``, fixed beforehand, and ``label_swap``."""
    found = results.select(quantity="churn", rule="bound", control="none", **how(results))
    return {
        name: r.params["floor"]
        for name in ("seed", "label_swap")
        for r in found
        if r.params["floor_from"] == name and "of" not in r.params
    }


def _outline(axes: Axes, cells: Mapping[Place, Record], floors: Mapping[str, float]) -> None:
    for (place, head), r in cells.items():
        if lower_bound(r) > floors.get("label_swap", math.inf):
            corner = (place - 0.5, head - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=0.8))
        if lower_bound(r) > floors.get("seed", math.inf):
            axes.plot(place, head, marker="o", markersize=2, color="black")


def place_of(record: Record) -> Place:
    """Return layer and head of a record."""
    place, _, head = str(record.params["head"]).partition(".")
    return int(place), int(head)
