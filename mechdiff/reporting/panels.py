"""Parts of a figure: bars with intervals and controls, and steps from one number to another.

1. A bar is a value with its 95 % interval; a control is a marker on the same place.
2. A value that would squash the scale is drawn at the edge as an arrow with its number.
3. A missing value is named where its bar would stand; it is never drawn as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from mechdiff.reporting.cells import component, layer
from mechdiff.results import Record

# The palette of Okabe and Ito (2008), which stays distinct under the common colour deficiencies.
COLOURS = {"last": "#0072B2", "user": "#E69F00", "template": "#009E73", "all": "#CC79A7"}
GREY = "#555555"
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "legend.frameon": False,
}
MARKERS: dict[str, dict[str, Any]] = {
    "mean_shift": {"marker": "^", "label": "control: mean shift"},
    "shuffled": {"marker": "X", "label": "control: shuffled rows"},
    "wrong_layer": {"marker": "s", "label": "control: wrong layer"},
    "other_prompt": {"marker": "D", "label": "control: other prompt's change"},
    "random": {"marker": "v", "label": "control: random change"},
}
_MARKER: dict[str, Any] = {
    "linestyle": "none",
    "markersize": 4.5,
    "markerfacecolor": "white",
    "markeredgecolor": "black",
    "markeredgewidth": 0.8,
    "zorder": 4,
}
_THIN: dict[str, Any] = {"color": "black", "linewidth": 0.7, "zorder": 3.2}

Cell = Callable[[str, str], Record | None]
"""Look up the record of (site, group of positions)."""


def marker(control: str) -> Line2D:
    """Return the legend entry of a control."""
    return Line2D([], [], **_MARKER, **MARKERS[control])


def offsets(groups: Sequence[str]) -> tuple[dict[str, float], float]:
    """Return the place of each group around a site and the width of its bar, in distances between sites."""
    width = 0.8 / max(len(groups), 2)
    return {group: (i - (len(groups) - 1) / 2) * width for i, group in enumerate(groups)}, width * 0.9


def label_sites(axes: Axes, sites: Sequence[str]) -> None:
    """Write the sites below the axis: layers alone where all are of one component."""
    names = {component(site) for site in sites}
    one = len(names) == 1
    axes.set_xticks(
        range(len(sites)), [str(layer(s)) if one else s for s in sites], rotation=0 if one else 30
    )
    axes.set_xlabel(f"layer ({names.pop()})" if one else "site")
    half = max(len(sites), 3) / 2  # a lone site keeps bars of sensible width
    middle = (len(sites) - 1) / 2
    axes.set_xlim(middle - half, middle + half)


def bars(
    axes: Axes, sites: Sequence[str], groups: Sequence[str], cell: Cell, controls: dict[str, Cell]
) -> None:
    """Draw a bar per site and group of positions with its interval and controls, on a linear axis with 0."""
    place, width = offsets(groups)
    drawn = [(s, g, cell(s, g)) for s in sites for g in groups]
    held = [r for _, _, r in drawn if r is not None and r.value is not None]
    beside = [
        r.value for get in controls.values() for s, g, _ in drawn if (r := get(s, g)) and r.value is not None
    ]
    low, high = _limits(held, beside)
    axes.set_ylim(low, high)
    axes.axhline(0, color="black", linewidth=0.9, zorder=2)
    for site, group, record in drawn:
        x = sites.index(site) + place[group]
        if record is None:
            continue
        if record.value is None:
            _write(axes, x, max(0.0, low), _reason(record), rotation=90)
            continue
        axes.bar(x, max(record.value, low), width, color=COLOURS[group], alpha=0.85, zorder=1.5)
        if record.value < low:
            _off_scale(axes, x, low, record.value)
        elif record.low is not None and record.high is not None:
            axes.vlines(
                x, max(record.low, low), min(record.high, high), color="black", linewidth=1.1, zorder=3
            )
        for name, get in controls.items():
            _control(axes, x, get(site, group), name, low)


def steps(
    axes: Axes,
    sites: Sequence[str],
    groups: Sequence[str],
    start: Cell,
    end: Cell,
    controls: dict[str, Cell],
    *,
    height: Callable[[float], float] = float,
    floor: float = -math.inf,
    beyond: str = "",
    note: Cell | None = None,
) -> None:
    """Draw an open circle, a filled one with its interval, and the step between them.

    Args:
        axes: Where to draw.
        sites: Sites, from left to right.
        groups: Groups of positions, side by side.
        start: Record of the open circle.
        end: Record of the filled circle.
        controls: Records of the markers.
        height: Map from a value to its place on the axis; rising or falling, never less than ``floor``.
        floor: Lowest place on the axis; what lies lower is drawn there.
        beyond: What to write there.
        note: Record written at each step: its value in per cent less, or why it is missing.
    """
    place, _ = offsets(groups)
    # Controls stand clear of the step, and nearer to it than to the next site.
    aside = min(0.035 * max(len(sites), 3), 0.25)

    def at(value: float) -> float:
        return max(height(value), floor)

    for i, site in enumerate(sites):
        for group in groups:
            x, colour = i + place[group], COLOURS[group]
            ends = [
                (r, r.value, face)
                for r, face in ((start(site, group), "white"), (end(site, group), colour))
                if r and r.value is not None
            ]
            if len(ends) == 2:
                axes.vlines(x, at(ends[0][1]), at(ends[1][1]), color=colour, linewidth=3, alpha=0.3, zorder=2)
            for record, value, face in ends:
                if record.low is not None and record.high is not None:
                    axes.vlines(x, at(record.low), at(record.high), color=colour, linewidth=1.1, zorder=3)
                axes.plot(x, at(value), "o", color=colour, mfc=face, mew=1.3, ms=5.5, zorder=5)
            for name, get in controls.items():
                beside = get(site, group)
                if beside is not None and beside.value is not None:
                    to = x - aside if name == "mean_shift" else x + aside
                    if beside.low is not None and beside.high is not None:
                        axes.vlines(to, at(beside.low), at(beside.high), **_THIN)
                    axes.plot(to, at(beside.value), **_MARKER, **MARKERS[name])
            said = note(site, group) if note else None
            reach = [at(v) for r, *_ in ends for v in (r.low, r.value, r.high) if v is not None]
            texts = [beyond] if any(height(value) < floor for _, value, _ in ends) else []
            if said is not None and said.value is None:
                texts.insert(0, _reason(said))
            if texts and reach:
                _write(axes, x, max(reach), ", ".join(texts), rotation=90, below=axes.yaxis_inverted())
            elif said is not None and said.value is not None and reach:
                _write(axes, x, min(reach), _minus(f"{-100 * said.value:+.0f} %"), below=True)


def _reason(record: Record) -> str:
    return str(record.reason).replace("_", " ")


def _write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    points: float = 6,
    rotation: int = 0,
    below: bool = False,
    color: str = GREY,
) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(0, -points if below else points),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        rotation=rotation,
        fontsize=6.5,
        color=color,
    )


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _limits(held: Sequence[Record], beside: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a linear axis: all bars above -1, and controls where they do not squash the bars."""
    ends = [v for r in held for v in (r.value, r.low, r.high) if v is not None]
    bottom, top = max(min([0.0, *ends]), -1.0), max([0.0, *ends, *beside])
    span = max(top - bottom, 0.05)
    near = [v for v in beside if v >= bottom - 0.6 * span]
    bottom = min([bottom, *near])
    off_scale = len(near) < len(beside) or bottom > min([0.0, *ends])
    span = max(top - bottom, 0.05)
    return bottom - (0.32 if off_scale else 0.08) * span, top + 0.08 * span


def _off_scale(axes: Axes, x: float, low: float, value: float, control: str | None = None) -> None:
    """Draw an arrow through the lower edge, with the number and the marker of its control."""
    axes.annotate(
        "",
        (x, low),
        xytext=(0, 15),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-|>", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0, "color": "black"},
        zorder=3.5,
    )
    if control is not None:
        lift = ScaledTranslation(0, 15 / 72, axes.figure.dpi_scale_trans)
        axes.plot(x, low, **_MARKER, **MARKERS[control], transform=axes.transData + lift, clip_on=False)
    _write(axes, x, low, _minus(f"{value:.2g}"), points=20 if control else 46, rotation=90, color="black")


def _control(axes: Axes, x: float, record: Record | None, name: str, low: float) -> None:
    if record is None or record.value is None:
        return
    if record.value < low:
        _off_scale(axes, x, low, record.value, name)
        return
    if record.low is not None and record.high is not None:
        axes.vlines(x, max(record.low, low), record.high, **_THIN)
    axes.plot(x, record.value, **_MARKER, **MARKERS[name])
