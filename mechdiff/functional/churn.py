"""Which heads changed between two models: paired differences of attributions against floors and nulls.

1. d = tuned − base of a head's attribution to the same prompt. A head has churned when the end of the 95 %
   interval of mean d that is nearer to 0 lies beyond a floor. Identical models have d = 0 and no churn.
2. Floors: a size that matters, fixed beforehand, and what labels swapped at random reach (`swap_floor`).
   The older rule, |mean| of 2 standard errors or more, is kept beside them: it grows with √n, so that with
   enough prompts every head passes.
3. The share of churned heads gets an interval from resampled prompts in which all heads are judged anew, by
   Student's approximation of their ends. Resamples carry the noise of the prompts twice and let more heads
   pass, so that their spread, not their position, is used (`centred`).
4. Two nulls judge differences where none is: labels swapped per prompt, and halves of one model's prompts.

Nothing here knows what a column is: edges between heads are judged in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, HEAD_Z, LEVEL
from mechdiff.functional.intervals import Intervals, bootstrap_means, centred, checked
from mechdiff.functional.percentiles import student
from mechdiff.functional.permutation import benjamini_hochberg, random_signs, sign_flip, swap_floor
from mechdiff.functional.stats import Interval, resample


class HeadChurn(NamedTuple):
    """What is known of each head's change.

    Attributes:
        difference: Mean of tuned − base, `(heads,)`.
        bound: Lower 95 % bound of its size, 0 where the interval covers 0, `(heads,)`.
        z: Mean in standard errors, `(heads,)`; infinite where all prompts agree exactly.
        p_max: Family-wise p over all heads, `(heads,)`.
        p_bh: p adjusted for the false discovery rate, `(heads,)`.
        floor: What labels swapped at random reach.
    """

    difference: Intervals
    bound: Tensor
    z: Tensor
    p_max: Tensor
    p_bh: Tensor
    floor: float


class NullShares(NamedTuple):
    """Shares of heads that pass where nothing differs.

    Attributes:
        mean: Over draws, `(floors + 1,)`; the last is that of |z| ≥ 2.
        low: 5th percentile of draws.
        high: 95th percentile.
        draws: Number of draws.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    draws: int


def head_churn(
    base: Tensor,
    tuned: Tensor,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> HeadChurn:
    """Judge the change of every head.

    Args:
        base: Attributions, `(prompts, heads)`.
        tuned: The same prompts and heads.
        generator: Source of resamples and swaps.
        draws: Number of resamples.
        level: Coverage.

    Raises:
        FitError: If there are fewer than 2 prompts.

    >>> base = torch.zeros(8, 2)
    >>> tuned = base + torch.tensor([1.0, 0.0])
    >>> churn = head_churn(base, tuned, generator=torch.Generator().manual_seed(0))
    >>> churn.bound.tolist(), churn.p_max.tolist(), churn.floor < 1
    ([1.0, 0.0], [0.0078125, 1.0], True)
    """
    d = checked(paired(base, tuned))
    difference = bootstrap_means(d, generator=generator, draws=draws, level=level)
    flips = sign_flip(d, generator=generator)
    floor = swap_floor(d, generator=generator, draws=draws, level=level)
    z = _errors(*_moments(d))
    return HeadChurn(difference, nearest(difference), z, flips.p_max, benjamini_hochberg(flips.p), floor)


def paired(base: Tensor, tuned: Tensor) -> Tensor:
    """Return tuned − base in float64, `(prompts, heads)`.

    >>> paired(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]])).tolist()
    [[0.5, 0.0]]
    """
    assert base.shape == tuned.shape, f"shapes {tuple(base.shape)} and {tuple(tuned.shape)} differ"
    return tuned.detach().to("cpu", torch.float64) - base.detach().to("cpu", torch.float64)


def nearest(interval: Intervals) -> Tensor:
    """Return how near to 0 each interval comes: the lower bound of a size.

    >>> ends = torch.tensor([0.5, -2.0, -1.0]), torch.tensor([1.0, -1.5, 3.0])
    >>> nearest(Intervals(torch.zeros(3), *ends, 9)).tolist()
    [0.5, 1.5, 0.0]
    """
    return torch.maximum(interval.low, -interval.high).clamp(min=0)


def shares(
    difference: Tensor,
    floors: Sequence[float],
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Tensor:
    """Return the share of heads beyond each floor, and last of those with |z| ≥ 2, without intervals.

    Args:
        difference: Tuned − base, `(prompts, heads)`.
        floors: In the unit of the difference.
        generator: Source of resamples.
        draws: Number of resamples.
        level: Coverage.

    >>> d = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.5, 0.0]])
    >>> shares(d, [0.1, 5.0], generator=torch.Generator().manual_seed(0)).tolist()
    [0.5, 0.0, 0.5]
    """
    bound = nearest(bootstrap_means(difference, generator=generator, draws=draws, level=level))
    table = checked(difference)
    return _shares(bound, _errors(*_moments(table)), floors)


def churn_shares(
    difference: Tensor,
    floors: Sequence[float],
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Intervals:
    """Estimate the share of churned heads for each floor, and last of those with |z| ≥ 2.

    The intervals speak of the expected share at this number of prompts.

    Args:
        difference: Tuned − base, `(prompts, heads)`.
        floors: In the unit of the difference.
        generator: Source of resamples.
        draws: Number of resamples.
        level: Coverage.

    Raises:
        FitError: If there are fewer than 2 prompts.

    >>> same = churn_shares(torch.zeros(9, 4), [0.0], generator=torch.Generator().manual_seed(0))
    >>> same.at(0), same.at(1)[:3]
    (Interval(value=0.0, low=0.0, high=0.0, n=9), (0.0, 0.0, 0.0))
    """
    value = shares(difference, floors, generator=generator, draws=draws, level=level)
    drawn = _drawn_shares(difference, floors, generator, draws, level)
    return centred(value, drawn, len(difference), level, (0.0, 1.0))


def churn_contrast(
    first: Tensor,
    second: Tensor,
    floors: tuple[float, float],
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Estimate churn of a second pair of models minus that of a first, over prompts of both.

    The pairs answer prompts of their own, which are resampled apart. One pair per kind of tuning says what
    these two siblings do, not what the kinds do.

    Args:
        first: Tuned − base of one pair, `(prompts, heads)`.
        second: The same of the other pair; other prompts and heads.
        floors: Floor of each, in the unit of its difference.
        generator: Source of resamples.
        draws: Number of resamples.
        level: Coverage.

    Returns:
        Difference of shares with its interval; n counts the prompts of both.

    >>> none, all_ = torch.zeros(9, 4), torch.ones(7, 5)
    >>> churn_contrast(none, all_, (0.1, 0.1), generator=torch.Generator().manual_seed(0))
    Interval(value=1.0, low=1.0, high=1.0, n=16)
    """
    sides = [
        (
            shares(d, [floor], generator=generator, draws=draws, level=level)[:1],
            _drawn_shares(d, [floor], generator, draws, level)[:, :1],
        )
        for d, floor in zip((first, second), floors, strict=True)
    ]
    (value, drawn), (other, other_drawn) = sides
    gap = centred(other - value, other_drawn - drawn, len(first) + len(second), level, (-1.0, 1.0))
    return gap.at(0)


def swapped_shares(
    difference: Tensor, floors: Sequence[float], *, generator: torch.Generator, draws: int = 100
) -> NullShares:
    """Judge the heads after swapping the labels base and tuned of randomly chosen prompts.

    Args:
        difference: Tuned − base, `(prompts, heads)`.
        floors: In the unit of the difference.
        generator: Source of swaps and resamples.
        draws: Number of swaps.

    >>> null = swapped_shares(torch.zeros(9, 4), [0.0], generator=torch.Generator().manual_seed(0), draws=3)
    >>> null.mean.tolist(), null.high.tolist()
    ([0.0, 0.0], [0.0, 0.0])
    """
    table = checked(difference)
    signs = random_signs(draws, len(table), generator)
    return _null((table * sign[:, None] for sign in signs), floors, generator)


def split_half_shares(
    attributions: Tensor, floors: Sequence[float], *, generator: torch.Generator, draws: int = 100
) -> NullShares:
    """Judge one model against itself: random halves of its prompts, paired at random.

    Args:
        attributions: Of one model, `(prompts, heads)`; 2m or 2m + 1 prompts give m pairs.
        floors: In the unit of the attributions.
        generator: Source of halves and resamples.
        draws: Number of splits.

    Raises:
        FitError: If there are fewer than 4 prompts.

    >>> table = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    >>> null = split_half_shares(table, [9.0], generator=torch.Generator().manual_seed(0), draws=4)
    >>> null.mean[0].item(), null.draws
    (0.0, 4)
    """
    table = checked(attributions, least=4)
    halves = (split_halves(table, generator) for _ in range(draws))
    return _null((paired(*half) for half in halves), floors, generator)


def split_halves(attributions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Deal prompts into two halves of equal size at random, `(prompts // 2, heads)` each.

    >>> one, other = split_halves(torch.arange(5.0)[:, None], torch.Generator().manual_seed(0))
    >>> len(one), len(other), len(set(one[:, 0].tolist()) & set(other[:, 0].tolist()))
    (2, 2, 0)
    """
    order, half = torch.randperm(len(attributions), generator=generator), len(attributions) // 2
    return attributions[order[:half]], attributions[order[half : 2 * half]]


def _null(tables: Iterable[Tensor], floors: Sequence[float], generator: torch.Generator) -> NullShares:
    found = torch.stack([shares(table, floors, generator=generator, draws=400) for table in tables])
    low, high = (
        found.quantile(0.05, 0, interpolation="lower"),
        found.quantile(0.95, 0, interpolation="higher"),
    )
    return NullShares(found.mean(0), low, high, len(found))


def _shares(bound: Tensor, z: Tensor, floors: Sequence[float]) -> Tensor:
    """Return shares over the last axis of heads, `(..., floors + 1)`."""
    passed = [bound > floor for floor in floors] + [z.abs() >= HEAD_Z]
    return torch.stack([heads.double().mean(-1) for heads in passed], -1)


def _drawn_shares(
    difference: Tensor, floors: Sequence[float], generator: torch.Generator, draws: int, level: float
) -> Tensor:
    """Judge all heads anew in each resample, `(draws, floors + 1)`."""
    table = checked(difference)
    means, squares = (resample(torch.cat([table, table.square()], 1), draws, generator) / len(table)).chunk(
        2, 1
    )
    error = _error(means, squares, len(table))
    bound = means.abs() - student(level, len(table)) * error
    return _shares(bound.clamp(min=0), _errors(means, error), floors)


def _moments(table: Tensor) -> tuple[Tensor, Tensor]:
    return table.mean(0), table.std(0) / math.sqrt(len(table))


def _error(mean: Tensor, square: Tensor, n: int) -> Tensor:
    """Return the standard error of a mean from the means of values and of squares."""
    return ((square - mean.square()).clamp(min=0) / (n - 1)).sqrt()


def _errors(mean: Tensor, error: Tensor) -> Tensor:
    """Return means in standard errors; 0 where both are 0."""
    return torch.where(mean == 0, 0.0, mean / error)
