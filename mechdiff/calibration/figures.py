"""Draw a calibration: power, coverage of intervals, and what is found of what was planted."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator, PercentFormatter

from mechdiff.calibration.cells import Cell
from mechdiff.errors import ConfigError
from mechdiff.reporting.divergence import DPI, WIDTH, finish
from mechdiff.reporting.panels import GREY, STYLE

POWER = 0.8
"""Power that is usually asked for."""

COLUMNS = 3
"""Panels side by side."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_SHAPES = "osD^vPX"


def plot_power(cells: Sequence[Cell], out: str | Path | None = None) -> Figure:
    """Draw power against the number of prompts: a panel per method, a line per kind and strength.

    Args:
        cells: A table of calibration.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If it holds no power.
    """
    found = _of(cells, "power")
    strengths = sorted({c.strength for c in found if c.strength is not None})
    shades = colormaps["viridis_r"]
    colours: dict[float | None, Any] = {
        strength: shades(0.15 + 0.75 * i / max(len(strengths) - 1, 1)) for i, strength in enumerate(strengths)
    }
    kinds = list(dict.fromkeys(c.kind for c in found))

    def panel(axes: Axes, shown: Sequence[Cell]) -> None:
        for kind, strength in dict.fromkeys((c.kind, c.strength) for c in shown):
            line = [c for c in shown if (c.kind, c.strength) == (kind, strength)]
            look = {"color": colours.get(strength, GREY), "marker": _SHAPES[kinds.index(kind) % len(_SHAPES)]}
            _line(axes, line, [c.prompts for c in line], **look)
        axes.axhline(POWER, color="black", linewidth=0.8, linestyle="--", zorder=1)
        _prompts_axis(axes, shown)
        axes.set_ylabel("found (share of trials)")

    handles = [Line2D([], [], color=colours[s], label=f"strength {s:g}") for s in strengths]
    handles += [_key(kind, i) for i, kind in enumerate(kinds)] if len(kinds) > 1 else []
    handles += [Line2D([], [], color="black", linewidth=0.8, linestyle="--", label=f"{POWER:.0%}")]
    more = "Lines: exact binomial 95 % intervals."
    return _panels(found, lambda c: f"{c.question}: {c.method}", panel, handles, more, out)


def plot_coverage(cells: Sequence[Cell], out: str | Path | None = None) -> Figure:
    """Draw how often 95 % intervals hold the truth: a panel per way of sampling, a line per estimate.

    Args:
        cells: A table of calibration.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If it holds no coverage.
    """
    found = _of(cells, "coverage")
    methods = list(dict.fromkeys(c.method for c in found))
    least = min(0.85, min(c.low for c in found) - 0.01)

    def panel(axes: Axes, shown: Sequence[Cell]) -> None:
        for number, method in enumerate(methods):
            line = [c for c in shown if c.method == method]
            shift = 1 + 0.03 * (number - len(methods) / 2)  # on a logarithmic axis
            _line(axes, line, [c.prompts * shift for c in line], **_look(number))
        for low, high in {c.wanted for c in shown if c.wanted is not None}:
            axes.axhspan(low, high, color="#009E73", alpha=0.12, linewidth=0, zorder=0.5)
        axes.axhline(0.95, color="black", linewidth=0.8, zorder=1)
        _prompts_axis(axes, shown)
        axes.set_ylim(least, 1.005)
        axes.yaxis.set_major_locator(MultipleLocator(0.05))
        axes.set_ylabel("intervals that hold the truth")

    handles: list[Any] = [Line2D([], [], ms=4, label=method, **_look(i)) for i, method in enumerate(methods)]
    handles.append(Patch(color="#009E73", alpha=0.12, label="asked for"))
    more = "Samples from one pool of prompts, whose value is the truth. Lines: exact binomial 95 % intervals."
    return _panels(found, lambda c: f"resampled: {c.kind}", panel, handles, more, out)


def plot_recall(cells: Sequence[Cell], out: str | Path | None = None) -> Figure:
    """Draw what is found of what was planted, by strength: a panel per quantity, a line per method and kind.

    Args:
        cells: A table of calibration.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If it holds nothing that was planted with a strength.
    """
    found = [c for c in _of(cells, "recall") if c.strength is not None]
    if not found:
        raise ConfigError("nothing to draw: no planted difference has a strength")
    lines = list(dict.fromkeys((c.method, c.kind) for c in found))

    def panel(axes: Axes, shown: Sequence[Cell]) -> None:
        for number, key in enumerate(lines):
            own = [c for c in shown if (c.method, c.kind) == key]
            line = [c for c in own if c.prompts == max(c.prompts for c in own)]
            _line(axes, line, [c.strength or 0.0 for c in line], **_look(number))
        for least in {c.wanted[0] for c in shown if c.wanted is not None}:
            axes.axhline(least, color="black", linewidth=0.8, linestyle="--", zorder=1)
        places = sorted({c.strength for c in shown if c.strength is not None})
        if places[0] > 0 and places[-1] > 4 * places[0]:
            axes.set_xscale("log")
        _ticks(axes, places)
        axes.set_xlabel("strength of the planted difference")
        axes.set_ylim(-0.02, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("share of trials")

    handles: list[Any] = [
        Line2D([], [], ms=4, label=f"{method}, {kind}", **_look(i)) for i, (method, kind) in enumerate(lines)
    ]
    handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="asked for"))
    more = "With most of the prompts that were tried. Lines: exact binomial 95 % intervals."
    return _panels(
        found, lambda c: f"{c.question}: {c.quantity.replace('_', ' ')}", panel, handles, more, out
    )


def _of(cells: Sequence[Cell], group: str) -> list[Cell]:
    found = [c for c in cells if c.group == group]
    if not found:
        raise ConfigError(f"nothing to draw: the calibration holds no {group.replace('_', ' ')}")
    return sorted(found, key=lambda c: (c.question, c.prompts))


def _panels(
    cells: Sequence[Cell],
    name: Callable[[Cell], str],
    draw: Callable[[Axes, Sequence[Cell]], None],
    handles: Sequence[Any],
    more: str,
    out: str | Path | None,
) -> Figure:
    names = list(dict.fromkeys(map(name, cells)))
    columns = min(len(names), COLUMNS)
    rows, lines = -(-len(names) // columns), -(-len(handles) // 3)
    with rc_context(STYLE):
        height = 0.6 + 2.6 * rows + 0.16 * lines
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(names) :]:
            axes.remove()
        for axes, title in zip(grid, names, strict=False):
            draw(axes, [c for c in cells if name(c) == title])
            axes.set_title("\n".join(textwrap.wrap(title, 90 // columns)))
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7)
        trials = sorted({c.trials for c in cells})
        sizes = f"{trials[0]:,}" if len(trials) == 1 else f"{trials[0]:,} to {trials[-1]:,}"
        text = textwrap.fill(f"{sizes} trials a point. {more}", 150)
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=GREY)
        return finish(figure, out)


def _line(axes: Axes, cells: Sequence[Cell], places: Sequence[float], **look: Any) -> None:
    if not cells:
        return
    order = sorted(range(len(cells)), key=lambda i: places[i])
    x, line = [places[i] for i in order], [cells[i] for i in order]
    axes.plot(x, [c.estimate for c in line], markersize=4, linewidth=1.2, zorder=3, **look)
    ends = [c.low for c in line], [c.high for c in line]
    axes.vlines(x, *ends, color=look["color"], linewidth=0.9, zorder=2)


def _prompts_axis(axes: Axes, cells: Sequence[Cell]) -> None:
    axes.set_xscale("log")
    _ticks(axes, sorted({c.prompts for c in cells}))
    axes.set_xlabel("prompts")
    axes.set_ylim(-0.02, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _ticks(axes: Axes, places: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{place:g}" for place in places])


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _SHAPES[number % len(_SHAPES)]}


def _key(kind: str, number: int) -> Line2D:
    shape = _SHAPES[number % len(_SHAPES)]
    return Line2D([], [], color=GREY, marker=shape, ms=4, linestyle="none", label=kind)
