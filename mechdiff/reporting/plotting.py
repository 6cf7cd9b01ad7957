"""Draw the figures of a run from its records alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from mechdiff.errors import ConfigError
from mechdiff.files import whole
from mechdiff.reporting.cells import CONTROLS, counts, find, pair_name, positions_of, sites_of
from mechdiff.reporting.panels import COLOURS, GREY, STYLE, Cell, bars, label_sites, marker, steps
from mechdiff.results import Results

_KL = ("kl_raw", "kl_mapped")
_EFFECTS = {
    "patch_agreement": (
        "Base: does the mapped patch act like the real one?",
        "agreement (fraction; 1 = same)",
    ),
    "effect_correlation": ("Base: do their effects on refusal go together?", "correlation within class"),
}
_WHERE = {"last": "the last position", "all": "all positions"}

WIDTH = 8.0
"""Width of a figure in inches; 1200 pixels at ``DPI``."""

DPI = 150
MANY_SITES = 5
"""Above this many sites the two panels of a figure stand one over the other."""

LOG_RANGE = 10.0
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""

FINE_RANGE = 3e3
"""Ratio of the ends of the R² axis below which it has room for ticks between the powers of ten."""


def plot_clt_bars(results: Results, out: str | Path | None = None) -> Figure:
    """Draw how well a linear map carries base states to tuned states, site by site.

    One panel holds R² of the difference, where the identity map is 0. The other holds R² itself, on an axis
    that is logarithmic in 1 - R², because the identity map alone often explains more than 95 %.

    Args:
        results: Table of a map run.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no R² of the difference.
    """
    sites, groups = _axes_of(results, ("r2_delta",))
    with rc_context(STYLE):
        stacked = len(sites) > MANY_SITES
        figure = Figure(figsize=(WIDTH, 6.6 if stacked else 4.4), dpi=DPI, layout="constrained")
        left, right = figure.subplots(2 if stacked else 1, 1 if stacked else 2, squeeze=False).ravel()
        bars(left, sites, groups, _cell(results, "r2_delta"), _controls(results, "r2_delta"))
        left.set_title("How much of tuned − base the map explains")
        left.set_ylabel("R² of the difference (fraction)")
        identity, fitted = _cell(results, "r2", "identity"), _cell(results, "r2")
        right.invert_yaxis()
        steps(
            right,
            sites,
            groups,
            identity,
            fitted,
            {},
            height=lambda r2: 1 - r2,
            floor=1e-5,
            beyond="> 0.99999",
        )
        _r2_axis(right)
        right.set_title("How much of the tuned state it explains")
        right.set_ylabel("R² (fraction; logarithmic in 1 − R²)")
        for axes in (left, right):
            label_sites(axes, sites)
        zero = Line2D([], [], color="black", linewidth=0.9, label="identity map: 0")
        circles = [_circle("white", "identity map"), _circle(GREY, "fitted map")]
        _legend(figure, results, groups, [zero, *circles], ("r2_delta",))
        _caption(figure, results, "r2_delta", "Map fitted and tested on separate groups of prompts.")
        return _finish(figure, out)


def plot_patch_bars(results: Results, out: str | Path | None = None) -> Figure:
    """Draw whether a mapped patch acts like the real one, site by site.

    Panels hold the divergence of the tuned model patched with base states, raw and mapped; the agreement of
    the mapped with the real patch in the base model; and the correlation of their effects.

    Args:
        results: Table of a map run with patching.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no divergence of a patched model.
    """
    sites, groups = _axes_of(results, (*_KL, *_EFFECTS))
    panels = [("kl", group) for group in positions_of(results, _KL)]
    panels += [(quantity, "") for quantity in _EFFECTS if positions_of(results, [quantity])]
    floor = _kl_floor(results, sites)
    with rc_context(STYLE):
        rows, columns = -(-len(panels) // 2), min(len(panels), 2)
        figure = Figure(figsize=(WIDTH, 1.2 + 3.0 * rows), dpi=DPI, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, (quantity, group) in zip(grid, panels, strict=False):
            if quantity == "kl":
                _kl_panel(axes, results, sites, group, floor)
            else:
                title, unit = _EFFECTS[quantity]
                shown = positions_of(results, [quantity])
                bars(axes, sites, shown, _cell(results, quantity), _controls(results, quantity))
                axes.set_title(title)
                axes.set_ylabel(unit)
            label_sites(axes, sites)
        circles = [_circle("white", "raw patch"), _circle(GREY, "mapped patch")]
        _legend(figure, results, groups, circles, (*_KL, *_EFFECTS))
        _caption(figure, results, "kl_raw", _self_patch(results))
        return _finish(figure, out)


def _kl_floor(results: Results, sites: Sequence[str]) -> float | None:
    """Return the lowest place on a logarithmic axis common to all panels, None for a linear one."""
    cells = product(_KL, sites, positions_of(results, _KL), ("none", *CONTROLS))
    values = [r.value for cell in cells if (r := find(results, *cell)) is not None and r.value]
    if not values or max(values) <= LOG_RANGE * min(values):
        return None
    return max(min(values) / 2, max(values) * 1e-5)


def _kl_panel(axes: Axes, results: Results, sites: Sequence[str], group: str, floor: float | None) -> None:
    raw, mapped, reduction = (_cell(results, quantity) for quantity in (*_KL, "kl_reduction"))
    controls = _controls(results, "kl_mapped")
    lowest, beyond = (0.0, "") if floor is None else (floor, f"< {floor:.1g}")
    steps(axes, sites, [group], raw, mapped, controls, floor=lowest, beyond=beyond, note=reduction)
    axes.margins(y=0.2)
    if floor is None:
        axes.axhline(0, color="black", linewidth=0.9)
    else:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 500 * bottom else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:g}"))
    axes.set_title(f"Tuned patched with base at {_WHERE.get(group, group)}")
    axes.set_ylabel("KL(tuned ‖ patched) (nats)")


def _r2_axis(axes: Axes) -> None:
    """Make an axis of 1 - R² logarithmic and label it with R²."""
    axes.set_yscale("log")
    axes.margins(y=0.12)
    bottom, top = axes.get_ylim()
    ticks: tuple[float, ...] = (-9, 0, 0.9, 0.99, 0.999, 0.9999, 0.99999)
    if bottom < FINE_RANGE * top:
        ticks += (-1, 0.5, 0.8, 0.95, 0.98, 0.995, 0.998, 0.9995)
    axes.yaxis.set_major_locator(FixedLocator([1 - r2 for r2 in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda gap, _: f"{1 - gap:.6g}".replace("-", "−")))


def _axes_of(results: Results, quantities: Sequence[str]) -> tuple[list[str], list[str]]:
    sites, groups = sites_of(results, quantities), positions_of(results, quantities)
    if not (sites and groups):
        raise ConfigError(
            f"nothing to draw: no record of {' or '.join(quantities)}; give the results.json of a map run"
        )
    return sites, groups


def _cell(results: Results, quantity: str, control: str = "none") -> Cell:
    return lambda site, group: find(results, quantity, site, group, control)


def _controls(results: Results, quantity: str) -> dict[str, Cell]:
    return {control: _cell(results, quantity, control) for control in CONTROLS}


def _self_patch(results: Results) -> str:
    values = [
        r.value
        for r in results.select(question="rq2", control="self")
        if r.quantity in _KL and r.value is not None
    ]
    return f"Self-patch: at most {max(values):.1g} nats." if values else ""


def _circle(face: str, label: str) -> Line2D:
    return Line2D([], [], marker="o", color=GREY, mfc=face, mew=1.3, linestyle="none", label=label)


def _legend(
    figure: Figure,
    results: Results,
    groups: Sequence[str],
    extra: Sequence[Line2D],
    quantities: Sequence[str],
) -> None:
    used = {r.control for r in results.select(question="rq2") if r.quantity in quantities}
    handles: list[Any] = [
        Patch(color=COLOURS[group], label=f"{group} position" + "s" * (group != "last")) for group in groups
    ]
    handles += extra
    handles += [marker(control) for control in CONTROLS if control in used]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 5), fontsize=7.5)


def _caption(figure: Figure, results: Results, quantity: str, more: str) -> None:
    name, behind = pair_name(results), counts(results, quantity)
    parts = (
        f"Pair {name}." if name else "",
        "Lines: 95 % intervals over prompts.",
        f"n = {behind}." if behind else "",
        more,
    )
    text = textwrap.fill(" ".join(part for part in parts if part), 150)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=GREY)


def _finish(figure: Figure, out: str | Path | None) -> Figure:
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with whole(Path(out)) as part:
            figure.savefig(part, format=Path(out).suffix.removeprefix("."))
    return figure
