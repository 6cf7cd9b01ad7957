"""Draw a calibration: what is found of what was planted, power, and coverage of intervals."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
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
_STROKES = ("-", "--", ":")


def recall_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return what is drawn of recall: what something is asked of, and what it is compared with."""
    asked = {c.quantity for c in cells if c.group == "recall" and c.wanted is not None}
    return _strong([c for c in cells if c.group == "recall" and c.quantity in asked])


def strength_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return what is drawn of power by strength."""
    return _strong([c for c in cells if c.group == "power"])


def power_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return what is drawn of power by prompts: what was tried with several numbers of them."""
    found = [c for c in cells if c.group == "power" and c.strength is not None]
    sizes: dict[tuple[Any, ...], set[int]] = {}
    for c in found:
        sizes.setdefault((c.kind, c.strength), set()).add(c.prompts)
    return _own([c for c in found if len(sizes[c.kind, c.strength]) > 1])


def coverage_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return what is drawn of coverage."""
    return [c for c in cells if c.group == "coverage"]


def plot_power(cells: Sequence[Cell], out: str | Path | None = None) -> Figure:
    """Draw power against the number of prompts: a panel per method, a line per kind and strength.

    Args:
        cells: A table of calibration.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If nothing was tried with several numbers of prompts.
    """
    found = _some(power_cells(cells), "power by number of prompts")
    lines = list(dict.fromkeys((c.kind, c.strength) for c in found))

    def panel(axes: Axes, shown: Sequence[Cell]) -> None:
        for number, key in enumerate(lines):
            line = [c for c in shown if (c.kind, c.strength) == key]
            shift = 1 + 0.03 * (number - len(lines) / 2)  # on a logarithmic axis
            _line(axes, line, [c.prompts * shift for c in line], **_look(number))
        axes.axhline(POWER, color="black", linewidth=0.8, linestyle="--", zorder=1)
        _prompts_axis(axes, shown)
        axes.set_ylabel("found (share of trials)")

    handles: list[Any] = [
        Line2D([], [], ms=4, label=f"{kind} of strength {strength:g}", **_look(i))
        for i, (kind, strength) in enumerate(lines)
    ]
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
    found = _some(coverage_cells(cells), "coverage")
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
    """Draw what is found of what was planted, by strength: a panel per quantity and method, a line per kind.

    Args:
        cells: A table of calibration.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If it holds nothing that was planted with a strength.
    """
    found = _some(recall_cells(cells), "planted difference with a strength")
    least = {c.quantity: c.wanted[0] for c in cells if c.group == "recall" and c.wanted is not None}
    return _by_strength(found, _place, least, out)


def plot_strength(cells: Sequence[Cell], out: str | Path | None = None) -> Figure:
    """Draw power against strength: a panel per method, a line per kind.

    Args:
        cells: A table of calibration.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If it holds no power by strength.
    """
    found = _some(strength_cells(cells), "power by strength")
    return _by_strength(found, lambda c: f"{c.question}: {c.method}", {}, out)


def _place(cell: Cell) -> str:
    return f"{cell.question}: {cell.quantity.replace('_', ' ')}, {cell.method}"


def _by_strength(
    cells: Sequence[Cell],
    name: Callable[[Cell], str],
    least: Mapping[str, float],
    out: str | Path | None,
) -> Figure:
    """Draw a panel per name; `least` is what is asked of a quantity."""
    kinds = list(dict.fromkeys(c.kind for c in sorted(cells, key=lambda c: c.kind)))

    def panel(axes: Axes, shown: Sequence[Cell]) -> None:
        places = sorted({c.strength for c in shown if c.strength is not None})
        for number, kind in enumerate(kinds):
            line = [c for c in shown if c.kind == kind]
            shift = 1 + 0.04 * (number - len(kinds) / 2)  # on a logarithmic axis
            _line(axes, line, [(c.strength or 0.0) * shift for c in line], **_look(number))
        if shown[0].quantity in least:
            axes.axhline(least[shown[0].quantity], color="black", linewidth=0.8, linestyle="--", zorder=1)
        axes.set_xscale("log")
        _ticks(axes, places)
        axes.set_xlabel("strength of the planted difference")
        axes.set_ylim(-0.02, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("share of trials")

    handles: list[Any] = [Line2D([], [], ms=4, label=kind, **_look(i)) for i, kind in enumerate(kinds)]
    if least:
        label = "asked for, where it is clearly measurable"
        handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle="--", label=label))
    more = "Strengths of different kinds have different units. Lines: exact binomial 95 % intervals."
    return _panels(cells, name, panel, handles, more, out)


def _strong(cells: Sequence[Cell]) -> list[Cell]:
    """Keep cells of a strength, with the number of prompts that most were tried with."""
    found = _own([c for c in cells if c.strength is not None])
    if not found:
        return []
    counts = Counter(c.prompts for c in found)
    usual = max(counts, key=lambda n: (counts[n], n))
    return [c for c in found if c.prompts == usual]


def _own(cells: Sequence[Cell]) -> list[Cell]:
    """Leave out kinds that others are part of, such as policies of all ranks."""
    kinds = {c.kind for c in cells}
    whole = {kind for kind in kinds if any(other.startswith(f"{kind}_") for other in kinds)}
    return sorted((c for c in cells if c.kind not in whole), key=lambda c: c.question)


def _some(cells: list[Cell], what: str) -> list[Cell]:
    if not cells:
        raise ConfigError(f"nothing to draw: the calibration holds no {what}")
    return cells


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
            axes.set_title("\n".join(textwrap.wrap(title, 78 // columns)))
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
    axes.vlines(x, *ends, color=look["color"], linewidth=0.9, alpha=0.6, zorder=2)


def _prompts_axis(axes: Axes, cells: Sequence[Cell]) -> None:
    axes.set_xscale("log")
    _ticks(axes, sorted({c.prompts for c in cells}))
    axes.set_xlabel("prompts")
    axes.set_ylim(-0.02, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _ticks(axes: Axes, places: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{place:g}" for place in places])


def _look(number: int) -> dict[str, Any]:
    """Return colour, marker and stroke; a second round of colours has other markers and is dashed."""
    again, place = divmod(number, len(_COLOURS))
    shape = _SHAPES[(place + again) % len(_SHAPES)]
    return {"color": _COLOURS[place], "marker": shape, "linestyle": _STROKES[again % len(_STROKES)]}
