"""Interval around the difference of two rates seen on the same prompts.

1. Each rate gets its Wilson score interval; their distances from the rates are combined as standard errors
   would be, with the correlation φ of the two answers.
2. A positive φ is corrected for continuity, so that two models that never differed on few prompts still get
   an interval of some width, where a bootstrap would give none.

Source: Newcombe, Statistics in Medicine 17 (1998) 2635, method 10.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from mechdiff.config import LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.stats import Interval


def paired_difference(first: Sequence[bool], second: Sequence[bool], level: float = LEVEL) -> Interval:
    """Estimate the difference of two rates, first − second.

    Args:
        first: Yes or no by prompt.
        second: Yes or no by prompt, in the same order.
        level: Coverage.

    Raises:
        FitError: If there are no prompts.

    >>> [round(x, 3) for x in paired_difference([True] * 15 + [False] * 25, [False] * 40)]
    [0.375, 0.216, 0.53, 40]
    >>> [round(x, 3) for x in paired_difference([False] * 40, [False] * 40)]
    [0.0, -0.088, 0.088, 40]
    """
    n = len(first)
    assert n == len(second), f"{n} answers of one model and {len(second)} of the other"
    if not n:
        raise FitError("a difference of rates over 0 prompts is undefined; at least 1 prompt is needed")
    yes_a, yes_b = sum(map(bool, first)), sum(map(bool, second))
    both = sum(bool(a) and bool(b) for a, b in zip(first, second, strict=True))
    # ad − bc of the two-by-two table, and the product of its margins
    cross = both * (n - yes_a - yes_b + both) - (yes_a - both) * (yes_b - both)
    margins = yes_a * yes_b * (n - yes_a) * (n - yes_b)
    phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins) if margins else 0.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    (down_a, up_a), (down_b, up_b) = (_wilson_arms(yes, n, z) for yes in (yes_a, yes_b))
    value = (yes_a - yes_b) / n
    low = value - _combined(down_a, up_b, phi)
    high = value + _combined(up_a, down_b, phi)
    return Interval(value, max(low, -1.0), min(high, 1.0), n)


def _wilson_arms(successes: int, n: int, z: float) -> tuple[float, float]:
    """Return how far the Wilson interval reaches below and above a proportion."""
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p - max(center - half, 0.0), min(center + half, 1.0) - p


def _combined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one * one + other * other - 2 * phi * one * other, 0.0))
