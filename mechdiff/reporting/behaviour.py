"""Draw what models do, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mechdiff.errors import ConfigError
from mechdiff.reporting.divergence import DPI, MODELS, WIDTH, caption, finish, grouped
from mechdiff.reporting.panels import STYLE
from mechdiff.results import Record, Results

GUESSES = {"chance": ":", "majority_letter": "--", "shuffled": "-."}
"""Controls of a score that need no second run, and how they are drawn."""
BEHAVIOURS = {
    "refusal_rate": "Refusals (fraction of answers)",
    "refusal_logodds": "Log-odds of refusing (nats)",
    "mc_acc": "Multiple choice (accuracy)",
    "exact_match": "Problems solved (fraction)",
    "bits_per_byte": "Bits per byte",
    "toxicity": "Toxicity (0 to 1)",
}


def plot_behaviour_bars(results: Results, out: str | Path | None = None) -> Figure:
    """Draw what each model does: refusals, multiple choice, problems and fluency.

    Args:
        results: Table of a run with `Behaviour`.
        out: File to write, its format given by the suffix.

    Raises:
        ConfigError: If the table holds no behaviour.
    """
    found = {quantity: behaviours(results, quantity) for quantity in BEHAVIOURS}
    empty = [q for q, cells in found.items() if cells and not any(_known(cell) for cell in cells.values())]
    found = {quantity: cells for quantity, cells in found.items() if cells and quantity not in empty}
    if not found:
        raise ConfigError("nothing to draw: no behaviour; give the results.json of an rq1 run")
    models = [m for m in MODELS if any(m in cell for cells in found.values() for cell in cells.values())]
    with rc_context(STYLE):
        rows = -(-len(found) // 2)
        figure = Figure(figsize=(WIDTH, 0.9 + 2.4 * rows), dpi=DPI, layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes in grid[len(found) :]:
            axes.remove()
        for axes, (quantity, cells) in zip(grid, found.items(), strict=False):
            grouped(axes, cells, models)
            _guesses(axes, results, quantity, list(cells))
            axes.set_title(BEHAVIOURS[quantity])
        handles: list[Any] = [Patch(color=MODELS[m], label=m) for m in models]
        drawn = {r.control for r in results.select(question="rq1") if r.quantity in found}
        handles += [
            Line2D([], [], color="black", ls=line, lw=0.9, label=control.replace("_", " "))
            for control, line in GUESSES.items()
            if control in drawn
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=7.5)
        more = "All tokens allowed. Lines: 95 % intervals over prompts (exact binomial for yes or no)."
        more += "".join(f" Not measured: {q.replace('_', ' ')}." for q in empty)
        caption(figure, results, more)
        return finish(figure, out)


def behaviours(results: Results, quantity: str, control: str = "none") -> dict[str, dict[str, Record]]:
    """Return the records of a behaviour, or of a control of it, without masking, by cell and model."""
    cells: dict[str, dict[str, Record]] = {}
    for r in results.select(question="rq1", quantity=quantity, control=control):
        if r.model in MODELS and not r.params.get("masking"):
            name = " ".join(str(v) for k, v in r.params.items() if k != "masking")
            cells.setdefault(name, {})[r.model] = r
    return cells


def _guesses(axes: Axes, results: Results, quantity: str, cells: Sequence[str]) -> None:
    """Draw a short line across each cell of a benchmark where guessing would end."""
    for control, line in GUESSES.items():
        for name, held in behaviours(results, quantity, control).items():
            level = next((r.value for r in held.values() if r.value is not None), None)
            for i, cell in enumerate(cells):
                if level is not None and cell.split()[0] == name.split()[0]:
                    axes.hlines(level, i - 0.42, i + 0.42, color="black", linestyle=line, linewidth=0.9)


def _known(cell: dict[str, Record]) -> bool:
    """Tell whether any model has a value."""
    return any(r.value is not None for r in cell.values())
