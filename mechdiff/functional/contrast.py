"""Interval around the difference of two estimates from prompts of their own.

The distances of each estimate from the ends of its interval are combined as standard errors would be, which
keeps intervals that are not symmetric and asks nothing but the intervals themselves.

Source: Zou and Donner, Statistics in Medicine 27 (2008) 1693, equation 2 with independent estimates.
"""

import math

from mechdiff.functional.stats import Interval


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
