"""Locked defaults, each with its unit if it has one.

They are the defaults of function and class signatures; a YAML file states only differences.
"""

from typing import Final

SEED: Final = 17
"""Seed of every generator."""

LAYER_STRIDE: Final = 2
"""Step from one point of a layer curve to the next, in layers."""

FALLBACK_LAYERS: Final = (22, 26)
"""Layers, from 0, used when no scan has chosen any, for ``FALLBACK_DEPTH`` blocks; scaled with depth."""

FALLBACK_DEPTH: Final = 32
"""Number of blocks of the model for which ``FALLBACK_LAYERS`` were set (Llama-3.1-8B)."""

CLT_TOKENS: Final = 8000
"""Aligned token positions wanted per layer to fit a linear map."""

VAL_FRACTION: Final = 0.2
"""Share of prompt groups used to choose lambda, and again for the test."""

LAMBDA_GRID: Final = tuple(10.0**e for e in range(-6, 4))
"""Ridge strengths, relative to tr(XᵀX)/d of the centred source per row."""

BOOTSTRAP_DRAWS: Final = 1000
"""Resamples of prompts behind a bootstrap interval."""

LEVEL: Final = 0.95
"""Coverage of intervals."""

NOISE_FACTOR: Final = 3.0
"""A ratio is reported only if its denominator exceeds this many times the noise floor."""

K_SWEEP: Final = (1, 2, 3, 4, 6, 8)
"""Ranks of a steering subspace, in directions."""

ALPHA_GRID: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0)
"""Strengths of an edit in units of its natural size."""

HEAD_Z: Final = 2.0
"""Standard errors of the mean difference above which the first rule counts a head as changed; any difference
passes with enough prompts."""

HEAD_ABS_DELTA_NAT: Final = 0.5
"""Least change of a head's attribution that counts on problems, in nats."""

HEAD_ABS_DELTA_PP: Final = 5.0
"""Least change of a head's effect that counts on refusals, in percentage points of their probability."""

RBO_PERSISTENCE: Final = 0.9
"""Weight of each place of a ranking relative to the one before; 0.9 puts 86 % of the weight on the first ten
(Webber et al. 2010)."""


def fallback_layers(num_layers: int) -> list[int]:
    """Scale the default layers to a model's depth.

    Args:
        num_layers: Number of blocks.

    Returns:
        Distinct layers, ascending.
    """
    return sorted(
        {min(round(layer * num_layers / FALLBACK_DEPTH), num_layers - 1) for layer in FALLBACK_LAYERS}
    )
