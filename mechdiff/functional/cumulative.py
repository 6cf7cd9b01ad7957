"""How much of an effect the k highest heads have together, and how few heads hold it.

1. f(k) = (m_k − m_none) / (m_all − m_none): the share of the all-heads effect when the k highest are patched
   jointly; f = 0 without heads and 1 with all. It is a ratio of means over prompts, its interval from
   resampling both.
2. CPR is the area under f over the share of heads patched, CMD the area of |1 − f|, by trapezoids over
   MIB's grid with at least one head at a time. The areas start at no heads with f = 0, so that additive heads
   in random order have CPR = CMD = 1/2 on average in a model of any size.
3. Concentration is the number of heads, largest first, that hold a share of Σ |mean effect|. Noise adds to
   every head and spreads it: compare the same number under swapped labels.

Source: Mueller et al. 2025 (MIB, arXiv:2504.13151), for f, CPR, CMD and the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.intervals import Intervals, bootstrap_means
from mechdiff.functional.stats import Interval

GRID = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Shares of the heads that are patched, in percent."""

SHARES = (0.5, 0.8)
"""Shares of Σ |mean effect| for which heads are counted."""


class Cumulative(NamedTuple):
    """Effect of the highest heads together.

    Attributes:
        curve: f(k), `(len(ks),)`.
        cpr: Area under f.
        cmd: Area of |1 − f|.
        gap: m_all − m_none in the unit of the measurements; check `measurable` before using the rest.
    """

    curve: Intervals
    cpr: Interval
    cmd: Interval
    gap: Interval


def grid_counts(heads: int, grid: Sequence[float] = GRID) -> list[int]:
    """Return the numbers of heads to patch, distinct and ascending.

    Args:
        heads: Number of heads.
        grid: Percentages, the last of them 100.

    >>> grid_counts(270)
    [1, 3, 5, 14, 27, 54, 135, 270]
    """
    assert grid[-1] == 100, "the grid must end with all heads"
    return sorted({max(1, int(heads * percent / 100 + 0.5)) for percent in grid})


def cumulative(
    none: Tensor,
    some: Tensor,
    ks: Sequence[int],
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Cumulative:
    """Estimate f(k), CPR and CMD from what was measured on each prompt.

    Where the all-heads effect of a resample is not of the sign of the estimate, the resample bounds nothing.

    Args:
        none: Measured without a patch, `(prompts,)`.
        some: Measured with the k highest heads patched, `(prompts, len(ks))`.
        ks: Numbers of heads, ascending; the last are all.
        generator: Source of resamples.
        draws: Number of resamples.
        level: Coverage.

    Raises:
        FitError: If there are fewer than 2 prompts, or all heads together have no effect.

    >>> none = torch.zeros(3)
    >>> some = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0]])
    >>> found = cumulative(none, some, [1, 2], generator=torch.Generator().manual_seed(0))
    >>> found.curve.value.tolist(), round(found.cpr.value, 12), round(found.cmd.value, 12)
    ([0.5, 1.0], 0.5, 0.5)
    """
    assert some.shape == (len(none), len(ks)), f"{tuple(some.shape)} for {len(none)} prompts and {len(ks)} k"
    effects = some.double() - none.double()[:, None]
    sign = effects[:, -1].mean().sign()
    if sign == 0:
        raise FitError(f"all {ks[-1]} heads together have no effect; a share of it is undefined")
    shares = torch.tensor([0.0, *(k / ks[-1] for k in ks)], dtype=torch.float64)

    def statistic(means: Tensor) -> Tensor:
        whole = means[:, -1:]
        f = torch.where(whole * sign > 0, means / whole, torch.nan)
        return torch.cat([f, areas(f, shares), whole], 1)

    found = bootstrap_means(effects, statistic, generator=generator, draws=draws, level=level)
    cpr, cmd, gap = (found.at(len(ks) + i) for i in range(3))
    return Cumulative(found.part(0, len(ks)), cpr, cmd, gap)


def areas(f: Tensor, shares: Tensor) -> Tensor:
    """Return CPR and CMD of curves.

    Args:
        f: Share of the effect without the first point, `(curves, points)`.
        shares: Share of the heads at each point, from 0 to 1, `(points + 1,)`.

    Returns:
        `(curves, 2)`.

    >>> line = torch.tensor([[0.25, 1.0]])
    >>> areas(line, torch.tensor([0.0, 0.25, 1.0])).tolist()
    [[0.5, 0.5]]
    """
    whole = torch.cat([torch.zeros_like(f[:, :1]), f], 1)
    return torch.stack([torch.trapezoid(y, shares.to(f)) for y in (whole, (1 - whole).abs())], 1)


def random_order(
    none: Tensor, some: Tensor, ks: Sequence[int], level: float = 0.9
) -> tuple[Intervals, Intervals]:
    """Return f(k), CPR and CMD of random orders: their mean over draws and the range of draws.

    Args:
        none: Measured without a patch, `(prompts,)`.
        some: Measured with k heads of each order patched, `(draws, prompts, len(ks))`.
        ks: Numbers of heads, ascending; the last are all.
        level: Share of draws within the range.

    Returns:
        f, `(len(ks),)`, and CPR and CMD, `(2,)`.

    Raises:
        FitError: If all heads together have no effect.

    >>> some = torch.tensor([[[1.0, 2.0]], [[0.0, 2.0]]])
    >>> curve, area = random_order(torch.zeros(1), some, [1, 2])
    >>> curve.value.tolist(), area.value.tolist()
    ([0.25, 1.0], [0.375, 0.625])
    """
    effects = (some.double() - none.double()[None, :, None]).mean(1)
    if not bool((effects[:, -1] != 0).all()):
        raise FitError(f"all {ks[-1]} heads together have no effect; a share of it is undefined")
    f = effects / effects[:, -1:]
    shares = torch.tensor([0.0, *(k / ks[-1] for k in ks)], dtype=torch.float64)
    values = torch.cat([f, areas(f, shares)], 1)
    low, high = (values.quantile(q, 0) for q in ((1 - level) / 2, (1 + level) / 2))
    found = Intervals(values.mean(0), low, high, len(none))
    return found.part(0, len(ks)), found.part(len(ks), len(ks) + 2)


def concentration(
    effects: Tensor,
    shares: Sequence[float] = SHARES,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Intervals:
    """Estimate how many heads hold given shares of the summed size of mean effects.

    Args:
        effects: `(prompts, heads)`.
        shares: Fractions of Σ |mean|.
        generator: Source of resamples.
        draws: Number of resamples.
        level: Coverage.

    Returns:
        Numbers of heads, `(len(shares),)`; 0 where no head has an effect.

    Raises:
        FitError: If there are fewer than 2 prompts.

    >>> effects = torch.tensor([[8.0, 1.0, -1.0, 0.0], [8.0, 1.0, -1.0, 0.0]])
    >>> concentration(effects, [0.8, 0.9], generator=torch.Generator().manual_seed(0)).value.tolist()
    [1.0, 2.0]
    """

    def statistic(means: Tensor) -> Tensor:
        sizes = means.abs().sort(1, descending=True).values.cumsum(1)
        wanted = torch.tensor(shares, dtype=torch.float64) * sizes[:, -1:] * (1 - 1e-12)
        found = torch.searchsorted(sizes, wanted) + 1
        return torch.where(sizes[:, -1:] > 0, found, 0).double()

    return bootstrap_means(
        effects,
        statistic,
        generator=generator,
        draws=draws,
        level=level,
        method="centred",
        bounds=(0.0, float(effects.shape[1])),
    )
