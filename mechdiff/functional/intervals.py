"""Intervals of many statistics of one table at once: a row per prompt, a column per head or arm.

1. Prompts are resampled whole, so that columns keep their dependence; a statistic is a function of the means
   of the columns.
2. `bca`, the default with few prompts: percentiles corrected for bias and skewness. `percentile`
   otherwise. Either is expanded for few prompts (`percentiles`).
3. `centred`: the spread of the resamples around their own mean is put around the estimate. It is meant for
   what noise shifts, such as the number of heads above a threshold or the overlap of two rankings: a resample
   carries the noise of the prompts twice, and its percentiles may exclude the estimate itself. The target is
   then the expected value at this number of prompts.
4. `hull`: from the lower of the percentile and the centred ends to the upper, for what noise shifts and what
   takes few values, such as the overlap of two sets of five.
5. Rows are put in an order that depends neither on that of the prompts nor on that of the columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.percentiles import corrects, ends
from mechdiff.functional.stats import Interval, resample, row_order

Statistic = Callable[[Tensor], Tensor]
"""Turns means of columns `(samples, columns)` into numbers `(samples, statistics)`."""


class Intervals(NamedTuple):
    """Several numbers of one table with their uncertainty.

    Attributes:
        value: Estimates, `(statistics,)`.
        low: Lower ends.
        high: Upper ends.
        n: Number of prompts behind them.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    n: int

    def at(self, index: int) -> Interval:
        """Return one of them."""
        return Interval(self.value[index].item(), self.low[index].item(), self.high[index].item(), self.n)

    def part(self, start: int, stop: int) -> Intervals:
        """Return those from one place up to another."""
        return Intervals(self.value[start:stop], self.low[start:stop], self.high[start:stop], self.n)


def checked(table: Tensor, least: int = 2) -> Tensor:
    """Return a float64 copy on the CPU of a table, its rows in their own order.

    Args:
        table: `(prompts, columns)`.
        least: Number of prompts that are needed.

    Raises:
        FitError: If there are too few prompts.

    >>> checked(torch.tensor([[3.0, 1.0], [2.0, 1.0]])).tolist()
    [[2.0, 1.0], [3.0, 1.0]]
    """
    table = table.detach().to("cpu", torch.float64)
    assert table.ndim == 2, f"expected (prompts, columns), got shape {tuple(table.shape)}"
    assert bool(table.isfinite().all()), "statistics need finite values"
    if len(table) < least:
        raise FitError(f"{len(table)} prompts are too few; at least {least} are needed")
    return table[row_order(table.sort(1).values)]


def bootstrap_means(
    table: Tensor,
    statistic: Statistic | None = None,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
    method: Literal["bca", "percentile", "centred", "hull"] | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    expand: bool = True,
) -> Intervals:
    """Estimate functions of column means and their bootstrap intervals over prompts.

    Where the statistic is NaN (a ratio without a denominator) a resample bounds nothing: it pushes both ends
    outwards, to infinity if there are enough of them.

    Args:
        table: `(prompts, columns)`.
        statistic: What is estimated; the means themselves by default.
        generator: Source of the resamples.
        draws: Number of resamples.
        level: Coverage.
        method: By default `bca` with few prompts (`percentiles.corrects`), else `percentile`.
        bounds: Least and greatest possible value, for `centred` and `hull`.
        expand: Expand the tails for few prompts.

    Raises:
        FitError: If there are fewer than 2 prompts.

    >>> table = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 4.0]])
    >>> [round(x, 2) for x in bootstrap_means(table, generator=torch.Generator().manual_seed(0)).at(0)]
    [1.0, 1.0, 1.0, 3]
    """
    table = checked(table)
    n, apply = len(table), statistic or (lambda means: means)
    total = table.sum(0, keepdim=True)
    value = apply(total / n)[0]
    drawn = apply(resample(table, draws, generator) / n)
    expanded = n if expand else None
    low, high = _around(value, drawn, expanded, level, bounds)
    if method == "centred":
        return Intervals(value, low, high, n)
    correct = method == "bca" or (method is None and corrects(n))
    left_out = apply((total - table) / (n - 1)) if correct else None
    lower, upper = ends(value, drawn, expanded, level, left_out)
    if method == "hull":
        lower, upper = torch.minimum(low, lower), torch.maximum(high, upper)
    return Intervals(value, lower, upper, n)


def centred(
    value: Tensor,
    drawn: Tensor,
    n: int,
    level: float = LEVEL,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Intervals:
    """Put the spread of resampled statistics around their own mean on the estimates.

    Args:
        value: Estimates, `(statistics,)`.
        drawn: The same from resamples, `(draws, statistics)`.
        n: Number of prompts.
        level: Coverage.
        bounds: Least and greatest possible value.

    >>> drawn = torch.arange(101, dtype=torch.float64)[:, None] / 100
    >>> [round(x, 3) for x in centred(torch.tensor([0.2]), drawn, 9, bounds=(0.0, 1.0)).at(0)]
    [0.2, 0.0, 0.7, 9]
    """
    return Intervals(value, *_around(value, drawn, n, level, bounds), n)


def detectable(deviation: float, n: int, level: float = LEVEL, power: float = 0.8) -> float:
    """Return the least mean that a two-sided test at `1 − level` finds with the given power.

    Args:
        deviation: Standard deviation over prompts.
        n: Number of prompts.
        level: Coverage of the matching interval.
        power: Probability of finding it.

    Returns:
        In the unit of the deviation, from the normal approximation.

    >>> round(detectable(1.0, 64), 3), round(detectable(1.0, 256), 3)
    (0.35, 0.175)
    """
    return _standard_errors(level, power) * deviation / math.sqrt(n)


def prompts_needed(deviation: float, effect: float, level: float = LEVEL, power: float = 0.8) -> int:
    """Return the least number of prompts with which a mean of this size is found with the given power.

    Args:
        deviation: Standard deviation over prompts.
        effect: The mean, not 0, in the same unit.
        level: Coverage of the matching interval.
        power: Probability of finding it.

    >>> prompts_needed(1.0, 0.35), prompts_needed(1.0, -0.175)
    (65, 257)
    """
    assert effect != 0, "no number of prompts finds nothing"
    return max(math.ceil((_standard_errors(level, power) * deviation / effect) ** 2), 2)


def _standard_errors(level: float, power: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)


def _around(
    value: Tensor, drawn: Tensor, n: int | None, level: float, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    low, high = ends(value, drawn - drawn.mean(0), n, level)
    return (value + low).clamp(*bounds), (value + high).clamp(*bounds)
