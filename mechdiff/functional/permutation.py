"""Tests of many differences at once, paired or of two groups of prompts: family-wise or by discovery rate.

1. If a label (base or tuned) says nothing, each prompt's difference is as likely with the other sign. Signs
   are flipped for whole prompts, so that heads keep their dependence. All patterns are tried where there are
   few enough, else random ones.
2. The statistic is |t|, which makes heads of unlike variance comparable. Under sign flips Σ d² stays the
   same, so that |t| rises with |Σ ± d| / √Σ d²: one product of matrices serves all heads and flips.
3. Of two groups of prompts (targets and neutral ones), the labels are shuffled instead. The sum of squares
   around the common mean stays the same, so that |t| rises with the size of the difference over its root.
4. The largest |t| over all heads gives family-wise p; the head's own gives p for Benjamini–Hochberg.

Source: Westfall and Young, Resampling-Based Multiple Testing (1993), single step, max T;
Benjamini and Hochberg, Journal of the Royal Statistical Society B 57 (1995) 289.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.intervals import checked

FEWEST = 6
"""Prompts below which no pattern of signs reaches p = 0.05: with 5 the least is 2/32."""

_CHUNK = 2**22
_TIE = 1 - 1e-12  # equal statistics may differ in the last bits


class Flipped(NamedTuple):
    """P-values of differences.

    Attributes:
        p: Of each head by itself, two-sided, `(heads,)`.
        p_max: Of each head among all, family-wise, `(heads,)`.
        draws: Number of sign patterns, or of shuffles, behind them.
    """

    p: Tensor
    p_max: Tensor
    draws: int


def sign_flip(difference: Tensor, *, generator: torch.Generator, draws: int | None = None) -> Flipped:
    """Test each column's mean against 0 by flipping the signs of whole rows.

    Args:
        difference: Tuned − base, `(prompts, heads)`.
        generator: Source of random patterns.
        draws: Random patterns where there are more; by default enough for the strictest step of
            Benjamini–Hochberg over these heads, and at least 10,000.

    Raises:
        FitError: If there are fewer than 2 prompts.

    >>> flips = sign_flip(torch.tensor([[1.0, 0.0]] * 6), generator=torch.Generator().manual_seed(0))
    >>> flips.p.tolist(), flips.draws
    ([0.03125, 1.0], 32)
    """
    table = checked(difference)
    length = table.square().sum(0).sqrt()
    unit = torch.where(length > 0, table / length, 0.0)
    seen = unit.sum(0).abs()
    wanted = draws or _enough(table.shape[1])
    single, family, count = torch.zeros_like(seen), torch.zeros_like(seen), 0
    exact = 2 ** (len(table) - 1) <= wanted
    for signs in _patterns(len(table), table.shape[1], wanted, generator, exact):
        flipped = (signs @ unit).abs()
        single += (flipped >= seen * _TIE).sum(0)
        family += (flipped.amax(1, keepdim=True) >= seen * _TIE).sum(0)
        count += len(signs)
    extra = 0 if exact else 1  # the pattern that was seen
    return Flipped((single + extra) / (count + extra), (family + extra) / (count + extra), count)


def label_shuffle(
    table: Tensor, labels: Tensor, *, generator: torch.Generator, draws: int | None = None
) -> Flipped:
    """Test each column's difference of two groups of rows by shuffling which row is of which group.

    Args:
        table: `(prompts, heads)`.
        labels: Whether each prompt is of the first group, `(prompts,)`, boolean.
        generator: Source of the shuffles.
        draws: Number of shuffles; by default as in `sign_flip`.

    Raises:
        FitError: If a group has no prompt.

    >>> table, labels = torch.tensor([[1.0]] * 8 + [[0.0]] * 8), torch.arange(16) < 8
    >>> label_shuffle(table, labels, generator=torch.Generator().manual_seed(0)).p.item() < 0.001
    True
    """
    both = checked(torch.cat([table.double(), labels[:, None].double()], 1))
    table, first = both[:, :-1], both[:, -1]
    n, size = len(table), int(first.sum())
    if not 0 < size < n:
        raise FitError(f"{size} of {n} prompts are of the first group; both groups need at least 1")
    table = table - table.mean(0)
    length = table.square().sum(0).sqrt()
    unit = torch.where(length > 0, table / length, 0.0)
    seen = (first @ unit).abs()  # the other group's sum is the same with the other sign
    wanted = draws or _enough(table.shape[1])
    single, family = torch.zeros_like(seen), torch.zeros_like(seen)
    step = max(1, _CHUNK // max(n, table.shape[1]))
    for start in range(0, wanted, step):
        order = torch.rand(min(step, wanted - start), n, generator=generator).argsort(1)
        shuffled = (first[order] @ unit).abs()
        single += (shuffled >= seen * _TIE).sum(0)
        family += (shuffled.amax(1, keepdim=True) >= seen * _TIE).sum(0)
    return Flipped((single + 1) / (wanted + 1), (family + 1) / (wanted + 1), wanted)


def swap_floor(
    difference: Tensor, *, generator: torch.Generator, draws: int = BOOTSTRAP_DRAWS, level: float = LEVEL
) -> float:
    """Return the size of a mean difference that labels swapped at random exceed in 5 % of heads and draws.

    It is one floor for all heads, set by those that vary most; it is strict where many heads changed much.

    Args:
        difference: Tuned − base, `(prompts, heads)`.
        generator: Source of the signs.
        draws: Number of swaps.
        level: Percentile of |mean|, over all heads and swaps together.

    Returns:
        In the unit of the difference; 0 for identical models.

    >>> swap_floor(torch.zeros(4, 3), generator=torch.Generator().manual_seed(0))
    0.0
    """
    table = checked(difference)
    blocks = _patterns(len(table), table.shape[1], draws, generator, exact=False)
    means = torch.cat([signs @ table for signs in blocks])
    sizes = (means / len(table)).abs().flatten()
    return sizes.kthvalue(math.ceil(level * len(sizes))).values.item()


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjust p-values so that those at or below q have a false discovery rate of at most q.

    Args:
        p: P-values, `(tests,)`.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.02, 0.5], dtype=torch.float64)).tolist()
    [0.03, 0.03, 0.5]
    """
    values, order = p.sort(stable=True)
    scaled = values * len(p) / torch.arange(1, len(p) + 1, dtype=p.dtype)
    least = scaled.flip(0).cummin(0).values.flip(0).clamp(max=1)
    return torch.empty_like(p).scatter_(0, order, least)


def random_signs(count: int, prompts: int, generator: torch.Generator) -> Tensor:
    """Draw signs ±1, `(count, prompts)`.

    >>> random_signs(2, 3, torch.Generator().manual_seed(0)).abs().tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    return torch.randint(2, (count, prompts), generator=generator).double() * 2 - 1


def _enough(heads: int) -> int:
    return max(10_000, math.ceil(2 * heads / (1 - LEVEL)))


def _patterns(
    prompts: int, heads: int, draws: int, generator: torch.Generator, exact: bool
) -> Iterator[Tensor]:
    """Yield sign patterns in blocks: all of them up to a common sign, or random ones."""
    total, step = (2 ** (prompts - 1) if exact else draws), max(1, _CHUNK // max(prompts, heads))
    for start in range(0, total, step):
        size = min(step, total - start)
        if exact:
            bits = torch.arange(start, start + size)[:, None] >> torch.arange(prompts)
            yield 1 - 2 * (bits & 1).double()
        else:
            yield random_signs(size, prompts, generator)
