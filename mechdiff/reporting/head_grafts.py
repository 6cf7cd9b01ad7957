"""Draw what changed in the heads themselves, and how much of the difference their weights carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mechdiff.errors import ConfigError
from mechdiff.reporting.divergence import DPI, WIDTH, caption, finish
from mechdiff.reporting.heads import Place, by_head
from mechdiff.reporting.panels import GREY, STYLE
from mechdiff.results import Record, Results

TOP_HEADS = 24
_OWN, _INHERITED, _DRAWN = "#0072B2", "#E69F00", "#9A9A9A"
_SAID = "with what it inherits from below"


def plot_head_grafts(results: Results, out: str | Path | None = None) -> Figure:
    """Draw the recovery from base's weights of one head, beside the size of the head's own change.

    Args:
        results: Table of a run on heads with grafts.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no graft of a head.
    """
    grafts = {
        place: r
        for control in ("none", "random")
        for place, r in by_head(results, quantity="graft_recovery", control=control).items()
    }
    if not grafts:
        raise ConfigError("nothing to draw: no head was grafted; give the results.json of an rq4 run")
    own = by_head(results, quantity="head_own_change", metric="norm", kind="own")
    inherited = by_head(results, quantity="head_inherited", metric="norm")
    order = sorted(grafts, key=lambda place: -_value(own.get(place)))[:TOP_HEADS]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.2), dpi=DPI, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        _bars(upper, order, grafts)
        upper.set_title("Base's weights of one head in tuned")
        upper.set_ylabel("recovery (fraction; 1 = base)")
        for i, place in enumerate(order):
            _change(lower, i, own.get(place), inherited.get(place), _colour(grafts[place]))
        lower.set_title("How much the head's contribution changed")
        unit = next((r.unit for r in own.values()), "fraction")
        lower.set_ylabel("‖change‖ / ‖tuned‖" if unit == "fraction" else f"‖change‖ ({unit})")
        lower.set_ylim(bottom=0)
        lower.set_xticks(range(len(order)), [f"{p}.{h}" for p, h in order], rotation=60, fontsize=7)
        lower.set_xlabel("head (layer.head), by own change")
        lower.set_xlim(-0.7, len(order) - 0.3)
        handles: list[Any] = [
            Patch(color=_OWN, label="own: same input, other weights"),
            Patch(color=_DRAWN, label="the same, heads drawn at random"),
            Line2D([], [], color=_INHERITED, marker="D", markersize=4, linestyle="none", label=_SAID),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7)
        first = next(iter(grafts.values()))
        more = f"n = {first.n} prompts, split {first.split}. Lines: 95 % intervals over prompts."
        if any(len(r.params.get("shares_kv", ())) > 1 for r in grafts.values()):
            more += " Heads that share keys and values change with the grafted one."
        caption(figure, results, more)
        return finish(figure, out)


def _bars(axes: Axes, order: list[Place], grafts: dict[Place, Record]) -> None:
    for i, place in enumerate(order):
        r = grafts[place]
        if r.value is None:
            said = str(r.reason).replace("_", " ")
            axes.text(i, 0, said, rotation=90, fontsize=6.5, color=GREY, ha="center", va="bottom")
            continue
        axes.bar(i, r.value, 0.75, color=_colour(r), alpha=0.85)
        if r.low is not None and r.high is not None:
            axes.vlines(i, r.low, r.high, color="black", linewidth=1.1)
    axes.axhline(0, color="black", linewidth=0.9)


def _change(axes: Axes, x: int, own: Record | None, inherited: Record | None, colour: str) -> None:
    if own is not None and own.value is not None:
        axes.bar(x, own.value, 0.75, color=colour, alpha=0.85)
        if own.low is not None and own.high is not None:
            axes.vlines(x, own.low, own.high, color="black", linewidth=1.1)
    if inherited is not None and inherited.value is not None:
        axes.plot(x, inherited.value, color=_INHERITED, marker="D", markersize=4)


def _value(record: Record | None) -> float:
    return 0.0 if record is None or record.value is None else record.value


def _colour(record: Record) -> str:
    return _DRAWN if record.control == "random" else _OWN
