"""Exact intervals around proportions.

1. The interval holds every proportion under which the observed count is not too unlikely, on either side.
2. Its ends are found by bisection on the exact distribution function.

Source: Clopper and Pearson, Biometrika 26 (1934).
"""

import math
from typing import Literal

import torch

from mechdiff.config import LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.stats import Interval


def binomial_interval(
    successes: int, n: int, level: float = LEVEL, side: Literal["both", "upper", "lower"] = "both"
) -> Interval:
    """Put the exact (Clopper–Pearson) interval around a proportion.

    Args:
        successes: Number of successes, 0 to `n`.
        n: Number of trials, at least 1.
        level: Coverage, guaranteed for every true proportion.
        side: `both` ends, or a one-sided bound that leaves the other end at 0 or 1.

    Raises:
        FitError: If `successes` is outside 0..`n` or `n` is not positive.

    >>> [round(x, 3) for x in binomial_interval(0, 40)]
    [0.0, 0.0, 0.088, 40]
    >>> round(binomial_interval(0, 40, side="upper").high, 3)  # the most that 0 of 40 still allows
    0.072
    """
    if n < 1 or not 0 <= successes <= n:
        raise FitError(f"successes={successes} of n={n}: n must be at least 1 and successes in 0..n")
    tail = (1 - level) / (2 if side == "both" else 1)
    low = 0.0 if side == "upper" else 1 - _upper_bound(n - successes, n, tail)
    high = 1.0 if side == "lower" else _upper_bound(successes, n, tail)
    return Interval(successes / n, low, high, n)


def _upper_bound(successes: int, n: int, tail: float) -> float:
    """Bisect for the proportion p with P(X ≤ successes | n, p) = tail."""
    if successes == n:
        return 1.0
    i = torch.arange(successes + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        log_cdf = torch.logsumexp(log_choose + i * math.log(p) + (n - i) * math.log1p(-p), 0)
        low, high = (p, high) if log_cdf > math.log(tail) else (low, p)
    return (low + high) / 2
