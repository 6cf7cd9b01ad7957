"""Compare a language model with its tuned sibling: what changed inside, where, and how much of it is causal.

The public names below are imported when first used, so that ``import mechdiff`` loads no other library.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "mechdiff.callbacks.behaviour": ("Behaviour",),
    "mechdiff.callbacks.grafts": ("Grafts",),
    "mechdiff.callbacks.heads": ("Heads",),
    "mechdiff.callbacks.layer_patch": ("LayerPatch",),
    "mechdiff.callbacks.patching": ("MappedPatch",),
    "mechdiff.data.activations": ("ActivationPairs",),
    "mechdiff.data.prompts": ("Prompt", "load_prompts"),
    "mechdiff.data.store": ("ActivationStore",),
    "mechdiff.errors": ("UsageError",),
    "mechdiff.extraction.collect": ("collect_last_token_resids",),
    "mechdiff.functional.cka": ("linear_cka", "standardize"),
    "mechdiff.functional.churn": ("churn_shares", "head_churn"),
    "mechdiff.functional.clt": ("fit_ridge", "map_states"),
    "mechdiff.functional.metrics": ("kl_divergence", "refusal_score"),
    "mechdiff.functional.steering": (
        "difference_in_means",
        "project_in",
        "project_out",
        "svd_around_direction",
    ),
    "mechdiff.handles.steering": ("steer",),
    "mechdiff.interventions.attribution": ("attribute", "grad_x_act", "integrated_gradients"),
    "mechdiff.interventions.hooks": ("cache_layer", "get_blocks", "intervene", "record"),
    "mechdiff.interventions.patching": ("head_patch_or_zero", "layer_patch_crossmodel"),
    "mechdiff.interventions.sites": ("Site",),
    "mechdiff.interventions.suffix": ("SuffixEngine",),
    "mechdiff.modules.base": ("DiffModule",),
    "mechdiff.modules.clt": ("CLTMap",),
    "mechdiff.pairs.alignment": ("encode",),
    "mechdiff.pairs.fairness": ("filter_shared", "mask_logits_to_allowed", "uses_only_shared"),
    "mechdiff.pairs.loading": ("LoadedPair", "load_pair"),
    "mechdiff.pairs.spec": ("PairSpec",),
    "mechdiff.pairs.voice": ("logprob_correct",),
    "mechdiff.pairs.tokenizers": ("SharedVocab", "load_tokenizers", "shared_vocab_maps"),
    "mechdiff.reporting.divergence": ("plot_divergence_curve", "plot_layer_patch"),
    "mechdiff.reporting.export": ("as_table", "write_records"),
    "mechdiff.reporting.grafts": ("plot_graft_bars",),
    "mechdiff.reporting.head_churn": ("plot_head_churn",),
    "mechdiff.reporting.plotting": ("plot_clt_bars", "plot_patch_bars"),
    "mechdiff.reporting.report.page": ("write_report",),
    "mechdiff.reporting.steering": ("plot_effect_vs_k",),
    "mechdiff.reporting.table": ("summary",),
    "mechdiff.results": ("Record", "Results"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mechdiff' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
