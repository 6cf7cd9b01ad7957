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
from mechdiff.reporting.head_churn import plot_head_churn
from mechdiff.reporting.head_curves import RANKINGS, plot_cumulative, plot_head_overlap, plot_head_truth
from mechdiff.reporting.head_grafts import plot_head_grafts
from mechdiff.reporting.heads import plot_head_maps
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
        [
            {"quantity": "patch_recovery", "model": "pair", "prompts": "curve", "positions": where}
            for where in ("last", "all")
        ],
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
    "head_maps": ("head_maps.png", plot_head_maps, [{"question": "rq4", "quantity": "head_attribution"}]),
    "head_churn": (
        "head_churn.png",
        plot_head_churn,
        [{"question": "rq4", "quantity": "head_attribution", "model": "pair"}],
    ),
    "head_overlap": ("head_overlap.png", plot_head_overlap, [{"quantity": q} for q in RANKINGS]),
    "head_cumulative": (
        "head_cumulative.png",
        plot_cumulative,
        [{"quantity": "cumulative_effect", "of": "all_heads"}],
    ),
    "head_grafts": (
        "head_grafts.png",
        plot_head_grafts,
        [{"question": "rq4", "quantity": "graft_recovery"}],
    ),
    "head_truth": (
        "head_truth.png",
        plot_head_truth,
        [{"quantity": "head_attribution", "method": "patch", "model": model} for model in ("tuned", "base")],
    ),
    "behaviour": ("behaviour.png", plot_behaviour_bars, [{"quantity": "refusal_rate", "model": "base"}]),
}
"""Name of a figure, its file, what draws it, and the records of which it needs some."""


def drawable(results: Results) -> Iterator[tuple[str, str, Plot]]:
    """Yield name, file and plot of each figure that has something to show."""
    for name, (file, plot, needs) in FIGURES.items():
        if any(results.select(**need) for need in needs):
            yield name, file, plot
