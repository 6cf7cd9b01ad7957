"""Intervals of many statistics of one table at once: a row per prompt, a column per head or arm.

1. Prompts are resampled whole, so that columns keep their dependence; a statistic is a function of the means
   of the columns.
2. `bca`, the default from `BCA_FROM` to `BCA_BELOW` prompts: percentiles corrected for bias and for the
   skewness of the estimate (acceleration from the delete-one values). `percentile` otherwise.
3. `centred`: the spread of the resamples around their own mean is put around the estimate. It is meant for
   what noise shifts, such as the number of heads above a threshold or the overlap of two rankings: a resample
   carries the noise of the prompts twice, and its percentiles may exclude the estimate itself. The target is
   then the expected value at this number of prompts.
4. `hull`: from the lower of the percentile and the centred ends to the upper, for what noise shifts and what
   takes few values, such as the overlap of two sets of five.
5. Tails are expanded: resamples spread too little, by √((n − 1)/n), and know nothing of Student's t. Without
   this, intervals of normal means over 16 prompts held the truth in 92 % of trials, with it in 95 %.
6. Rows are put in an order that depends neither on that of the prompts nor on that of the columns.

Source: Efron, Journal of the American Statistical Association 82 (1987) 171 (BCa); Hesterberg, The American
Statistician 69 (2015) 371 (expanded percentiles); Abramowitz and Stegun (1964), 26.7.3 and 26.7.4 (Student).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.stats import Interval, resample, row_order

BCA_BELOW = 50
"""Number of prompts below which percentiles are corrected."""

BCA_FROM = 5
"""Number of prompts from which they are: with fewer, both ends can move past the estimate."""

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
        method: By default `bca` from `BCA_FROM` to below `BCA_BELOW` prompts, else `percentile`.
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
    tails = _tails(level, n if expand else None, len(value))
    around = _around(value, drawn, n, tails, bounds)
    if method == "centred":
        return around
    if method == "bca" or (method is None and BCA_FROM <= n < BCA_BELOW):
        tails = _corrected(tails, value, drawn, apply((total - table) / (n - 1)))
    low, high = _ends(drawn, tails)
    if method == "hull":
        low, high = torch.minimum(low, around.low), torch.maximum(high, around.high)
    return Intervals(value, low, high, n)


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
    return _around(value, drawn, n, _tails(level, n, len(value)), bounds)


@lru_cache(maxsize=256)
def student(level: float, n: int) -> float:
    """Return the two-sided quantile of Student's t with n − 1 degrees of freedom.

    Args:
        level: Coverage.
        n: Number of prompts, at least 2.

    >>> round(student(0.95, 16), 4), round(student(0.95, 1001), 4)
    (2.1314, 1.9623)
    """
    freedom, low, high = n - 1, 0.0, 0.5 * math.pi
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < level else (low, angle)
    return math.tan((low + high) / 2) * math.sqrt(freedom)


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
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * deviation / math.sqrt(n)


def _within(angle: float, freedom: int) -> float:
    """Return P(|t| ≤ √ν tan θ) by its finite sum."""
    square, term = math.cos(angle) ** 2, 1.0 if freedom % 2 == 0 else math.cos(angle)
    total = 0.0
    for i in range(freedom % 2 + 2, freedom + 1, 2):
        total += term
        term *= square * (i - 1) / i
    total *= math.sin(angle)
    return total if freedom % 2 == 0 else (angle + total) * 2 / math.pi


def _tails(level: float, n: int | None, count: int) -> Tensor:
    """Return the percentiles to read, `(2, count)`, expanded for n prompts."""
    normal, tail = NormalDist(), (1 - level) / 2
    if n is not None:
        tail = normal.cdf(-math.sqrt(n / (n - 1)) * student(level, n))
    return torch.tensor([[tail], [1 - tail]], dtype=torch.float64).expand(2, count)


def _around(value: Tensor, drawn: Tensor, n: int, tails: Tensor, bounds: tuple[float, float]) -> Intervals:
    low, high = _ends(drawn - drawn.mean(0), tails)
    return Intervals(value, (value + low).clamp(*bounds), (value + high).clamp(*bounds), n)


def _corrected(tails: Tensor, value: Tensor, drawn: Tensor, left_out: Tensor) -> Tensor:
    """Return the percentiles that correct for bias and acceleration, `(2, statistics)`."""
    below = ((drawn < value).double() + (drawn <= value).double()).mean(0) / 2
    edge = 0.5 / len(drawn)  # an estimate beyond all resamples has no finite correction
    shift = torch.special.ndtri(below.clamp(edge, 1 - edge))
    gaps = left_out.mean(0) - left_out
    spread = gaps.square().sum(0)
    bend = torch.where(spread > 0, gaps.pow(3).sum(0) / (6 * spread.pow(1.5)), 0.0)
    z = shift + torch.special.ndtri(tails)
    return torch.special.ndtr(shift + z / (1 - bend * z).clamp(min=1e-6))  # the limit where it turns over


def _ends(drawn: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
    """Return one percentile of each column below and one above, rounded outwards."""
    lost, last = drawn.isnan(), len(drawn) - 1
    ends = []
    for tail, outwards, infinity in ((tails[0], torch.floor, -math.inf), (tails[1], torch.ceil, math.inf)):
        column = drawn.where(~lost, infinity).sort(0).values
        ends.append(column.gather(0, outwards(tail * last).long().clamp(0, last)[None])[0])
    return ends[0], ends[1]
