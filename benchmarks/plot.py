"""Draw what was measured against the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import met

MET, MISSED = "#2a7f62", "#b4462f"


def draw_goals(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how many times each goal is reached: right of 1 it is met; bars span the rounds.

    Args:
        lines: Measurements; the newest of each counts.
        path: Where the SVG goes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    newest = {line["what"]: line for line in lines if line.get("limit") is not None}
    rows = []
    for what, line in newest.items():
        for name, ratio in line["ratios"].items():
            if met(ratio) is not None:
                value, low, high = (ratio[key] / ratio["goal"] for key in ("value", "low", "high"))
                if ratio.get("at_most"):
                    value, low, high = 1 / value, 1 / high, 1 / low
                rows.append((f"{what}: {name.replace('_', ' ')}", value, low, high, bool(met(ratio))))
    if not rows:
        return
    with mpl.rc_context({"svg.hashsalt": "goals", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(8.5, 0.5 + 0.28 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, (_, value, low, high, good) in enumerate(rows):
            colour = MET if good else MISSED
            axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [place], "o" if good else "s", color=colour, markersize=5)
        axes.axvline(1, color="0.4", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.invert_yaxis()
        axes.set_xlabel("times the goal (right of 1: met; squares: missed)")
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
