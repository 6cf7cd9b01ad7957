"""Which figures a table of records allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.figure import Figure

from mechdiff.reporting.behaviour import plot_behaviour_bars
from mechdiff.reporting.divergence import (
    plot_divergence_curve,
    plot_divergence_matrix,
    plot_layer_patch,
)
from mechdiff.reporting.grafts import plot_graft_bars
from mechdiff.reporting.handles import plot_head_paths, plot_monitor, plot_transfer_matrix
from mechdiff.reporting.plotting import plot_clt_bars, plot_patch_bars
from mechdiff.reporting.steering import EDITS, plot_alpha_curves, plot_effect_vs_k
from mechdiff.results import Results

Plot = Callable[..., Figure]

FIGURES: dict[str, tuple[str, Plot, list[dict[str, Any]]]] = {
    "clt": ("clt_r2.png", plot_clt_bars, [{"quantity": "r2_delta"}]),
    "patch": ("patch_kl.png", plot_patch_bars, [{"quantity": "kl_raw"}, {"quantity": "kl_mapped"}]),
    "divergence": (
        "divergence.png",
        plot_divergence_curve,
        [{"question": "rq1", "quantity": "cka_debiased", "model": "pair"}],
    ),
    "divergence_matrix": (
        "divergence_matrix.png",
        plot_divergence_matrix,
        [{"question": "rq1", "matrix": True}],
    ),
    "layer_patch": (
        "layer_patch.png",
        plot_layer_patch,
        [{"quantity": "patch_recovery", "model": "pair", "positions": where} for where in ("last", "all")],
    ),
    "grafts": ("grafts.png", plot_graft_bars, [{"quantity": "graft_recovery", "component": "block.0"}]),
    "effect_vs_k": (
        "effect_vs_k.png",
        plot_effect_vs_k,
        [{"quantity": "interchange_recovery", "split": "eval", "edit": edit} for edit in EDITS],
    ),
    "alpha_curves": (
        "alpha_curves.png",
        plot_alpha_curves,
        [{"quantity": "interchange_recovery", "split": "dev", "edit": "interchange", "alpha": 0.5}],
    ),
    "transfer": ("transfer.png", plot_transfer_matrix, [{"quantity": "transfer_effect"}]),
    "monitor": ("monitor.png", plot_monitor, [{"quantity": "probe_auroc"}]),
    "head_paths": (
        "head_paths.png",
        plot_head_paths,
        [{"quantity": "head_path_effect", "metric": "projection", "mode": "swap"}],
    ),
    "behaviour": ("behaviour.png", plot_behaviour_bars, [{"quantity": "refusal_rate", "model": "base"}]),
}
"""Name of a figure, its file, what draws it, and the records of which it needs some."""


def drawable(results: Results) -> Iterator[tuple[str, str, Plot]]:
    """Yield name, file and plot of each figure that has something to show."""
    for name, (file, plot, needs) in FIGURES.items():
        if any(results.select(**need) for need in needs):
            yield name, file, plot
