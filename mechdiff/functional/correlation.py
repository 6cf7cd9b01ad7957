"""Correlation within classes, with its bootstrap interval.

Both variables are centred within each class, in the sample and again in each resample, so a difference
between classes is not mistaken for agreement within them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.percentiles import ends
from mechdiff.functional.stats import Groups, Interval, finite, group_index, ordered, resample


def bootstrap_correlation(
    x: Tensor,
    y: Tensor,
    classes: Groups | None = None,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Estimate the pooled within-class Pearson correlation and its bootstrap interval.

    Resampling keeps the size of every class. A resample without variance counts as 0.

    Args:
        x: One number per prompt, `(n,)`.
        y: One number per prompt, `(n,)`.
        classes: Class of each prompt (for example target or neutral); None is one class.
        generator: Source of the resamples.
        draws: Number of resamples.
        level: Coverage.

    Raises:
        FitError: If either variable is constant within every class.

    >>> x = torch.tensor([0.0, 1.0, 10.0, 11.0])
    >>> draws = torch.Generator().manual_seed(0)
    >>> round(bootstrap_correlation(x, -x, ["a", "a", "b", "b"], generator=draws).value, 6)
    -1.0
    """
    pairs = torch.stack([finite(x), finite(y)], 1)
    index = (
        group_index(classes, len(pairs))
        if classes is not None
        else torch.zeros(len(pairs), dtype=torch.int64)
    )
    parts = sorted((ordered(pairs[index == c]) for c in index.unique()), key=lambda part: part.tolist())
    full, drawn = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(draws, 3, dtype=torch.float64)
    for part in parts:
        a, b = (part - part.mean(0)).unbind(1)
        cells = torch.stack([a * b, a * a, b * b, a, b], 1)
        full += _products(cells.sum(0, keepdim=True), len(part))
        drawn += _products(resample(cells, draws, generator), len(part))
    spread = torch.cat([part.abs().max(0, keepdim=True).values for part in parts]).max(0).values ** 2
    if bool((full[0, 1:] <= 1e-28 * spread).any()):
        raise FitError(
            f"a correlation over {len(pairs)} prompts is undefined: one side is constant within every class"
        )
    value, r = (_correlation(products, 1e-28 * spread) for products in (full, drawn))
    low, high = ends(value, r[:, None], len(pairs), level)
    return Interval(value.item(), low.item(), high.item(), len(pairs))


def _products(sums: Tensor, n: int) -> Tensor:
    """Turn sums of ab, aa, bb, a, b over n rows into centred ab, aa, bb."""
    ab, aa, bb, a, b = sums.unbind(1)
    return torch.stack([ab - a * b / n, aa - a * a / n, bb - b * b / n], 1)


def _correlation(products: Tensor, floor: Tensor) -> Tensor:
    ab, aa, bb = products.unbind(1)
    defined = (aa > floor[0]) & (bb > floor[1])
    return torch.where(defined, ab / (aa * bb).where(defined, torch.ones(())).sqrt(), 0.0).clamp(-1, 1)
