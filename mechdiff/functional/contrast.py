"""Interval around the difference of two estimates, from prompts of their own or from shared ones.

1. Apart: the distances of each estimate from the ends of its interval are combined as standard errors would
   be, which keeps intervals that are not symmetric and asks nothing but the intervals themselves.
2. Together: prompts are resampled with what both estimates make of them.

Source: Zou and Donner, Statistics in Medicine 27 (2008) 1693, equation 2 with independent estimates, for 1.
"""

import math

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.percentiles import counting, ends
from mechdiff.functional.stats import Interval, resample


def independent_difference(first: Interval, second: Interval) -> Interval:
    """Estimate second − first.

    Args:
        first: An estimate with its interval.
        second: Another one, from other prompts or other models, with the same coverage.

    Returns:
        The difference with its interval; n counts the prompts of both.

    >>> independent_difference(Interval(0.5, 0.2, 0.8, 40), Interval(0.5, 0.1, 0.9, 40))
    Interval(value=0.0, low=-0.5, high=0.5, n=80)
    >>> independent_difference(Interval(1.0, 1.0, 1.0, 4), Interval(3.0, 3.0, 3.0, 5))
    Interval(value=2.0, low=2.0, high=2.0, n=9)
    """
    value = second.value - first.value
    low = value - math.hypot(second.value - second.low, first.high - first.value)
    high = value + math.hypot(second.high - second.value, first.value - first.low)
    return Interval(value, low, high, first.n + second.n)


def recovery_difference(
    cells: Tensor,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Estimate second − first of two recoveries 1 − Σ left / Σ gap, over the distinct prompts of both.

    Prompts of both, of the first and of the second alone are resampled each among themselves, so that every
    resample has as many prompts of either as there are.

    Args:
        cells: Left and gap of the first, left and gap of the second, `(prompts, 4)`; a prompt that one of
            them has not seen is 0 there.
        generator: Source of the resamples.
        draws: Number of resamples.
        level: Coverage.

    Returns:
        The difference with its percentile interval, expanded for the gap that rests on fewer prompts; n
        counts distinct ones.

    Raises:
        FitError: If one of them has no gap.

    >>> shared = torch.tensor([[1.0, 2.0, 0.5, 2.0], [3.0, 6.0, 1.5, 6.0]])
    >>> recovery_difference(shared, generator=torch.Generator().manual_seed(0))
    Interval(value=0.25, low=0.25, high=0.25, n=2)
    """
    cells = cells.detach().to("cpu", torch.float64)
    total = cells.sum(0)
    if not (total[1] > 0 and total[3] > 0):
        raise FitError(f"gaps of {total[1]:g} and {total[3]:g} nats; recoveries need gaps above 0")
    seen = 2 * (cells[:, :2] != 0).any(1).long() + (cells[:, 2:] != 0).any(1).long()
    parts = [cells[seen == kind] for kind in seen.unique()]
    drawn = torch.stack([resample(part, draws, generator) for part in parts]).sum(0)
    value, fewest = _recovered(total[None]), min(counting(cells[:, gap]) for gap in (1, 3))
    low, high = ends(value, _recovered(drawn)[:, None], fewest, level)
    return Interval(value.item(), low.item(), high.item(), len(cells))


def _recovered(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
