"""Draw which heads changed between two models, against floors and nulls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from mechdiff.config import HEAD_Z, LEVEL
from mechdiff.errors import ConfigError
from mechdiff.reporting.divergence import DPI, WIDTH, caption, finish
from mechdiff.reporting.heads import NULLS, Place, by_head, floors_of, how, lower_bound, place_of, said
from mechdiff.reporting.panels import GREY, STYLE
from mechdiff.results import Record, Results

RULES = {
    "seed": "fixed\nfloor",
    "label_swap": "floor of\nswapped labels",
    "churn_p": "family-wise\np ≤ {level:g}",
    "churn_bh": "false disc.\nrate {level:g}",
    "z": "|z| ≥ {floor:g} †",
}
"""Rules by which a head counts as changed, from the strictest."""
ONE_SIBLING = "One tuned model per kind of tuning: this says what these two do, not what the kinds do."
TOP_HEADS = 24
_CHANGED, _SAME, _RED = "#0072B2", "#9DB8CC", "#B00020"
_SWAP: dict[str, Any] = {"color": "#CCCCCC", "linewidth": 3}
_LINES: dict[str, dict[str, Any]] = {
    "none": {"color": _CHANGED, "linewidth": 1.3, "label": "tuned against base"},
    "label_swap": {"color": GREY, "linestyle": "--", "linewidth": 1.2, "label": "null: labels swapped"},
    "split_half": {
        "color": "#E69F00",
        "linestyle": "--",
        "linewidth": 1.2,
        "label": "null: halves of one model",
    },
}
_OVER: dict[str, Any] = {
    "fontsize": 7,
    "frameon": True,
    "facecolor": "white",
    "edgecolor": "none",
    "framealpha": 1,
}
_FLOOR: dict[str, Any] = {"color": _RED, "linewidth": 1, "linestyle": "--"}


def plot_head_churn(results: Results, out: str | Path | None = None) -> Figure:
    """Draw the heads that changed most with the floors, and the share by each rule, with its null.

    Args:
        results: Table of a run on heads.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no head.
    """
    main = how(results)
    heads = by_head(results, quantity="head_attribution", model="pair", **main)
    if not heads:
        raise ConfigError("nothing to draw: no head was compared; the models have other numbers of heads")
    certain = by_head(results, quantity="churn_p", **main)
    shares = [r for r in results.select(quantity="churn", of=None, group=None, **main)]
    first = next(iter(heads.values()))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6.4), dpi=DPI, layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1), height_ratios=(1, 1.05))
        _largest(figure.add_subplot(grid[0, :]), heads, certain, floors_of(results))
        left, right = (figure.add_subplot(grid[1, column]) for column in range(2))
        _rules(left, results)
        _curve(right, shares, floors_of(results), first.unit)
        handles: list[Any] = [
            Patch(color=_CHANGED, label="changed by more than swapped labels reach"),
            Patch(color=_SAME, label="not"),
            Line2D([], [], color=GREY, marker="$*$", linestyle="none", label="family-wise p ≤ 0.05"),
            Line2D([], [], **_FLOOR, label="fixed floor"),
            Patch(color="#CCCCCC", label="floor of swapped labels"),
        ]
        handles += [_null_mark(name) for name in NULLS if any(r.control == name for r in shares)]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=7)
        more = f"{said(main)}. n = {first.n} prompts, {len(heads)} heads, split {first.split}."
        more += " Lines and bands: 95 % intervals over prompts; of nulls: mean to 95th percentile of draws."
        if any(r.params.get("rule") == "z" for r in shares):
            more += " † |z| grows with the number of prompts."
        caption(figure, results, f"{more} {_contrast(results)}".strip())
        return finish(figure, out)


def rules_of(results: Results) -> dict[str, list[Record]]:
    """Return the shares of changed heads and their nulls by each of ``RULES``, for the main measurement."""
    found = {
        name: results.select(question="rq4", quantity=name, site=None) for name in ("churn_p", "churn_bh")
    }
    for r in results.select(question="rq4", quantity="churn"):
        name = r.params.get("floor_from") or r.params.get("rule")
        for rule in (name,) if name else ("seed", "label_swap", "z"):  # nothing was judged
            found.setdefault(rule, []).append(r)
    main = how(results) if found else {}
    kept = {
        name: [r for r in found.get(name, []) if main.items() <= r.params.items() and _of_all(r)]
        for name in RULES
    }
    return {name: records for name, records in kept.items() if records}


def _of_all(record: Record) -> bool:
    """Say whether a share is one of all heads, not of edges or of a selection of heads."""
    return not {"of", "group"} & set(record.params)


def label_of(rule: str, records: Sequence[Record]) -> str:
    """Return the label of a rule, with its level."""
    return RULES[rule].format(**{"level": 1 - LEVEL, "floor": HEAD_Z, **records[0].params})


def _largest(
    axes: Axes, heads: Mapping[Place, Record], certain: Mapping[Place, Record], floors: Mapping[str, float]
) -> None:
    """Draw the largest changes with their intervals and the floors."""
    top = sorted((r for r in heads.values() if r.value), key=lambda r: -abs(float(r.value or 0)))[:TOP_HEADS]
    swap, fixed = floors.get("label_swap"), floors.get("seed")
    if swap:
        axes.axhspan(-swap, swap, color="#CCCCCC", alpha=0.7, linewidth=0, zorder=0.5)
    for i, r in enumerate(top):
        value, changed = float(r.value or 0), swap is not None and lower_bound(r) > swap
        axes.bar(i, value, 0.75, color=_CHANGED if changed else _SAME, zorder=1.5)
        ends = [value]
        if r.low is not None and r.high is not None:
            axes.vlines(i, r.low, r.high, color="black", linewidth=1.1, zorder=3)
            ends += [r.low, r.high]
        p = certain.get(place_of(r))
        if p is not None and p.value is not None and p.value <= 0.05:
            style: dict[str, Any] = {"ha": "center", "color": GREY, "fontsize": 9}
            up = value >= 0
            axes.annotate(
                "*",
                (i, max(ends) if up else min(ends)),
                (0, 1 if up else -2),
                textcoords="offset points",
                va="bottom" if up else "top",
                **style,
            )
    axes.axhline(0, color="black", linewidth=0.9)
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    unit = next(iter(heads.values())).unit
    title = "The largest changes"
    if fixed is not None and top:
        reached = [y for y in (-fixed, fixed) if low <= y <= high]
        for y in reached:
            axes.axhline(y, **_FLOOR)
        if not reached:
            title += f" (the fixed floor of {fixed:g} {unit} is off the scale)"
    axes.set_title(title)
    axes.set_ylabel(f"tuned − base ({unit})")
    axes.set_xticks(range(len(top)), [str(r.params["head"]) for r in top], rotation=60, fontsize=7)
    axes.set_xlabel("head (layer.head)")
    axes.set_xlim(-0.7, max(len(top), 1) - 0.3)
    if not top:
        axes.set_yticks([0])
        axes.text(0.5, 0.55, "no head differs", transform=axes.transAxes, ha="center", color=GREY)


def _rules(axes: Axes, results: Results) -> None:
    """Draw the share of heads that changed by each rule, with what the rule finds where nothing differs."""
    bars = rules_of(results)
    for i, found in enumerate(bars.values()):
        for r in found:
            if r.value is None:
                axes.text(i, 0, str(r.reason).replace("_", " "), rotation=90, fontsize=6.5, color=GREY)
            elif r.control == "none":
                axes.bar(i, 100 * r.value, 0.65, color=_CHANGED, alpha=0.85)
                if r.value == 0:
                    axes.annotate("0", (i - 0.2, 0), (0, 2), textcoords="offset points", fontsize=7)
                if r.low is not None and r.high is not None:
                    axes.vlines(i, 100 * r.low, 100 * r.high, color="black", linewidth=1.1, zorder=3)
        for j, name in enumerate(NULLS):
            nulls = [r for r in found if r.control == name and r.value is not None]
            for number, r in enumerate(nulls):
                x = i + 0.14 * (j + 1) + 0.12 * (number + j) - 0.1
                _null(axes, x, r, name)
    labels = [label_of(name, found) for name, found in bars.items()]
    axes.set_xticks(range(len(bars)), labels, fontsize=6.5)
    axes.set_xlim(-0.6, max(len(bars), 1) - 0.4)
    axes.set_ylim(0, max(1.15 * axes.get_ylim()[1], 5))
    axes.set_title("Heads that changed, by rule")
    axes.set_ylabel("heads (%)")


def _null(axes: Axes, x: float, record: Record, name: str) -> None:
    value = 100 * float(record.value or 0)
    if record.high is not None:
        axes.vlines(x, value, 100 * record.high, color="black", linewidth=0.7, zorder=3.2)
    axes.plot(x, value, marker=NULLS[name][0], mfc="white", mec="black", mew=0.8, markersize=4, zorder=4)


def _null_mark(name: str) -> Line2D:
    style: dict[str, Any] = {"mfc": "white", "mec": "black", "mew": 0.8, "markersize": 4}
    return Line2D([], [], marker=NULLS[name][0], linestyle="none", label=f"null: {NULLS[name][1]}", **style)


def _curve(axes: Axes, shares: Sequence[Record], floors: Mapping[str, float], unit: str) -> None:
    """Draw the share of changed heads against the floor."""
    swept = [r for r in shares if r.params.get("floor_from") == "curve" and r.params["floor"] > 0]
    for control, style in _LINES.items():
        for model in dict.fromkeys(r.model for r in swept if r.control == control):
            found = sorted((r for r in swept if (r.control, r.model) == (control, model)), key=_floor)
            held = [(_floor(r), r.value, r.low, r.high) for r in found if r.value is not None]
            if held:
                x, *ys = zip(*held, strict=True)
                value, low, high = ([100 * float(y or 0) for y in column] for column in ys)
                axes.plot(x, value, **style)
                if control == "none":
                    axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.set_title("Heads that changed, by floor")
    axes.set_ylabel("heads (%)")
    if not swept:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    left, right = axes.get_xlim()
    for name, line in (("label_swap", _SWAP), ("seed", _FLOOR)):
        if left <= floors.get(name, 0) <= right:
            axes.axvline(floors[name], zorder=0.8, **line)
    axes.set_xlabel(f"floor ({unit})")
    axes.set_ylim(bottom=0)
    used = {r.control for r in swept}
    axes.legend(handles=[Line2D([], [], **style) for c, style in _LINES.items() if c in used], **_OVER)


def _floor(record: Record) -> float:
    return float(record.params["floor"])


def _contrast(results: Results) -> str:
    """Say how the churn of two pairs compares, and what that bounds."""
    parts = []
    for r in results.select(quantity="churn_difference"):
        if r.value is not None and r.low is not None and r.high is not None:
            one, other = r.params["pairs"]
            ends = f"[{100 * r.low:.1f}, {100 * r.high:.1f}]"
            parts.append(f"{other} − {one}: {100 * r.value:+.1f} {ends} % of heads.".replace("-", "−"))
            parts += [ONE_SIBLING] if "one_sibling_per_class" in r.flags else []
    return " ".join(dict.fromkeys(parts))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
