"""Draw what grafts of weights say: which blocks carry the difference, and the way from base to tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mechdiff.errors import ConfigError
from mechdiff.reporting.divergence import DPI, MODELS, WIDTH, caption, finish
from mechdiff.reporting.panels import STYLE
from mechdiff.results import Record, Results

DIRECTIONS = {
    "base_into_tuned": ("Base's weights put into tuned", "#0072B2"),
    "tuned_into_base": ("Tuned's weights put into base", "#CC79A7"),
}
PARTS = {"attn": "o", "mlp": "s"}
LABELS = {"target": "-", "neutral": "--"}


def plot_graft_bars(results: Results, out: str | Path | None = None) -> Figure:
    """Draw the recovery of each grafted block and its parts, and the interpolation of the weights.

    Args:
        results: Table of a run with `Grafts`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no graft of a block.
    """
    blocks = [r for r in results.select(quantity="graft_recovery") if _kind(r) == "block"]
    if not blocks:
        raise ConfigError("nothing to draw: no graft of a block; give the results.json of an rq1 run")
    way = results.select(quantity="interpolation_kl")
    effects = results.select(quantity="interpolation_effect")
    with rc_context(STYLE):
        rows = 2 + bool(way)
        figure = Figure(figsize=(WIDTH, 0.9 + 2.3 * rows), dpi=DPI, layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for row, (direction, (title, colour)) in enumerate(DIRECTIONS.items()):
            grid[row, 1].remove()
            grid[row, 0].remove()
            axes = figure.add_subplot(grid[row, 0].get_gridspec()[row, :])
            _blocks(axes, results.select(quantity="graft_recovery", direction=direction), colour)
            axes.set_title(title)
        if way:
            _way(grid[2, 0], way, "reference", MODELS)
            grid[2, 0].set_title("θ_base + λ (θ_tuned − θ_base)")
            grid[2, 0].set_ylabel("KL from either model (nats)")
            if effects:
                metric = _metric(effects)
                _behaviour(grid[2, 1], [r for r in effects if r.params["metric"] == metric])
                grid[2, 1].set_title("Its behaviour")
                said = "log P(correct)" if metric == "logprob_correct" else "log-odds of refusing"
                grid[2, 1].set_ylabel(f"{said} (nats)")
            else:
                grid[2, 1].remove()
        grey: dict[str, Any] = {"color": "black", "linestyle": "none", "mfc": "white", "markersize": 4}
        handles: list[Any] = [
            Patch(color=colour, label=f"whole block, {name.partition(' ')[0].lower()}")
            for name, colour in DIRECTIONS.values()
        ]
        handles += [Line2D([], [], marker=m, label=f"{part} alone", **grey) for part, m in PARTS.items()]
        if any(r.control == "random" for r in blocks):
            plain: dict[str, Any] = {"color": "black", "linestyle": "none", "markersize": 4.5}
            handles.append(Line2D([], [], marker="x", label="change shuffled (control)", **plain))
        if way:
            handles += [Line2D([], [], color=colour, label=f"KL from {m}") for m, colour in _models(way)]
        if effects:
            handles += [
                Line2D([], [], color="black", ls=style, label=f"{label} prompts")
                for label, style in LABELS.items()
            ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=7)
        sizes = sorted({r.n for r in blocks})
        counted = f"n = {' to '.join(str(n) for n in sorted({*sizes[:1], *sizes[-1:]}))} prompts."
        caption(figure, results, f"Lines and bands: 95 % intervals over prompts. {counted}")
        return finish(figure, out)


def _kind(record: Record) -> str:
    return str(record.params["component"]).partition(".")[0]


def _layer(record: Record) -> int:
    return int(str(record.params["component"]).partition(".")[2])


def _metric(effects: list[Record]) -> str:
    metrics = {r.params["metric"] for r in effects}
    return "logprob_correct" if "logprob_correct" in metrics else str(min(metrics))


def _models(way: list[Record]) -> list[tuple[str, str]]:
    return [(m, c) for m, c in MODELS.items() if any(r.params["reference"] == m for r in way)]


def _blocks(axes: Axes, records: list[Record], colour: str) -> None:
    """Draw a bar per block, and its two parts beside each other."""
    for r in records:
        if r.control != "none":
            if r.value is not None:
                axes.plot(_layer(r), r.value, marker="x", color="black", markersize=4.5)
        elif _kind(r) == "block" and r.value is not None:
            axes.bar(_layer(r), r.value, 0.8, color=colour, alpha=0.85)
            if r.low is not None and r.high is not None:
                axes.vlines(_layer(r), r.low, r.high, color="black", linewidth=1.1)
        elif _kind(r) in PARTS and r.value is not None:
            x = _layer(r) + (-0.2 if _kind(r) == "attn" else 0.2)
            axes.plot(x, r.value, marker=PARTS[_kind(r)], mfc="white", mec="black", markersize=3.2)
    axes.axhline(0, color="black", linewidth=0.9)
    axes.set_xlabel("block")
    axes.set_ylabel("recovery (fraction)")
    axes.margins(x=0.01)
    if all(r.value is None for r in records):
        axes.text(0.5, 0.5, str(records[0].reason).replace("_", " "), transform=axes.transAxes, ha="center")


def _way(axes: Axes, records: list[Record], key: str, colours: dict[str, str]) -> None:
    """Draw one line per reference along lambda."""
    for name, colour in colours.items():
        _curve(axes, [r for r in records if r.params[key] == name], color=colour)


def _behaviour(axes: Axes, records: list[Record]) -> None:
    for label, style in LABELS.items():
        found = [r for r in records if r.params["label"] == label]
        _curve(axes, found, color="black", linestyle=style)


def _curve(axes: Axes, records: list[Record], **style: Any) -> None:
    held = sorted((r.params["lambda_"], r.value, r.low, r.high) for r in records if r.value is not None)
    if not held:
        return
    x, y, low, high = zip(*held, strict=True)
    axes.plot(x, y, marker="o", markersize=2.5, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("λ")
