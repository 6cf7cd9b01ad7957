"""Linear probes: tell two classes of states apart, and say how well that works on others.

1. The direction is Σ⁻¹Δμ, with Σ the scatter within the classes, shrunk to its mean variance; a score is 0
   halfway between the two means. With fewer rows than dimensions it is solved within the span of the rows,
   which gives the same direction.
2. AUROC comes with a bootstrap over prompts within each class. Where the classes are wholly apart there is
   nothing to resample, and the end near 1 is the exact bound of "all of the smaller class".
3. As a gate, a probe fires above the largest threshold that keeps a wanted share of the positives.

Source: Friedman 1989 (JASA 84) for the shrinkage; Hanley and McNeil 1982 (Radiology 143) for the area.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.config import BOOTSTRAP_DRAWS, LEVEL
from mechdiff.errors import FitError
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import Interval


class Probe(NamedTuple):
    """A linear score; above 0 a state is nearer to the positive class.

    Attributes:
        direction: `(d,)`, float64, of length 1.
        offset: What is subtracted from the projection.
    """

    direction: Tensor
    offset: float

    def __call__(self, states: Tensor) -> Tensor:
        """Score states `(..., d)`: `(...)`, float64."""
        return states.to(self.direction) @ self.direction - self.offset


def fit_probe(positive: Tensor, negative: Tensor, shrinkage: float = 0.1) -> Probe:
    """Fit the linear discriminant of two classes.

    Args:
        positive: `(rows, d)`.
        negative: `(rows, d)`.
        shrinkage: Weight of the mean variance against the scatter, above 0 and at most 1.

    Raises:
        FitError: If a class is empty, the classes have one mean or do not scatter, or the shrinkage is out of
            range.

    >>> probe = fit_probe(torch.tensor([[2.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    >>> probe.direction.tolist(), probe(torch.tensor([[3.0, 5.0], [1.0, 9.0]])).tolist()
    ([1.0, 0.0], [2.0, 0.0])
    """
    if not 0 < shrinkage <= 1:
        raise FitError(f"shrinkage is {shrinkage}; allowed: above 0, at most 1 (key: shrinkage)")
    if not len(positive) or not len(negative):
        raise FitError(f"a probe needs both classes; found {len(positive)} and {len(negative)} rows")
    a, b = (rows.detach().to(torch.float64) for rows in (positive, negative))
    within, delta = torch.cat([a - a.mean(0), b - b.mean(0)]), a.mean(0) - b.mean(0)
    floor = shrinkage * within.square().sum() / within.numel()
    if not floor > 0 or not delta.norm() > 0:
        raise FitError("a probe needs classes that scatter and have different means")
    span = None
    if len(within) + 1 < within.shape[1]:
        span = torch.linalg.qr(torch.cat([within, delta[None]]).mT).Q
        within, delta = within @ span, delta @ span
    scatter = (1 - shrinkage) * within.mT @ within / len(within)
    scatter.diagonal().add_(floor)
    direction = torch.linalg.solve(scatter, delta)
    direction = direction if span is None else span @ direction
    direction = direction / direction.norm()
    return Probe(direction, float((a.mean(0) + b.mean(0)) @ direction / 2))


def best_probe(positive: Tensor, negative: Tensor, shrinkage: float = 0.1) -> Probe:
    """Fit the linear discriminant of two classes; where nothing tells them apart every state scores 0.

    Args:
        positive: `(rows, d)`, at least one.
        negative: `(rows, d)`, at least one.
        shrinkage: As in `fit_probe`.

    >>> best_probe(torch.ones(2, 3), torch.ones(2, 3))(torch.ones(1, 3)).tolist()
    [0.0]
    """
    try:
        return fit_probe(positive, negative, shrinkage)
    except FitError:
        if not (len(positive) and len(negative) and 0 < shrinkage <= 1):
            raise
        return Probe(torch.zeros(positive.shape[1], dtype=torch.float64, device=positive.device), 0.0)


def auroc_interval(
    scores: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Estimate how often a positive scores above a negative (a tie counts half), with its interval.

    Args:
        scores: One number per prompt, `(n,)`.
        labels: Whether it is positive, `(n,)`, boolean.
        generator: Source of the resamples.
        draws: Number of resamples; each class keeps its size.
        level: Coverage.

    Raises:
        FitError: If there is no positive or no negative.

    >>> scores, labels = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([False, False, True, True])
    >>> [round(x, 3) for x in auroc_interval(scores, labels, generator=torch.Generator().manual_seed(0))]
    [1.0, 0.158, 1.0, 4]
    """
    scores, labels = scores.detach().to("cpu", torch.float64), labels.cpu().bool()
    above, below = scores[labels].sort().values, scores[~labels].sort().values
    if not len(above) or not len(below):
        raise FitError(f"an AUROC needs both classes; found {len(above)} positives, {len(below)} negatives")
    wins = (above[:, None] > below).double() + 0.5 * (above[:, None] == below).double()
    picks = [_counts(len(part), draws, generator) for part in (above, below)]
    drawn = ((picks[0] @ wins) * picks[1]).sum(1) / wins.numel()
    tail = (1 - level) / 2
    low = drawn.quantile(tail, interpolation="lower").item()
    high = drawn.quantile(1 - tail, interpolation="higher").item()
    value, fewer = wins.mean().item(), min(wins.shape)
    if value == 1:
        low = binomial_interval(fewer, fewer, level).low
    elif value == 0:
        high = binomial_interval(0, fewer, level).high
    return Interval(value, low, high, len(scores))


def keeping(scores: Tensor, share: float) -> float:
    """Return the largest threshold that at least a share of the scores reach.

    Args:
        scores: Those of the positives, `(n,)`.
        share: Above 0, at most 1.

    Raises:
        FitError: If there are no scores, or the share is out of range.

    >>> keeping(torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.75)
    2.0
    """
    if not len(scores) or not 0 < share <= 1:
        raise FitError(f"a threshold that keeps {share} of {len(scores)} scores; allowed: above 0, at most 1")
    needed = math.ceil(share * len(scores) - 1e-9)
    return float(scores.sort(descending=True).values[needed - 1])


def _counts(n: int, draws: int, generator: torch.Generator) -> Tensor:
    """How often each of n is drawn, `(draws, n)`, float64."""
    picks = torch.randint(n, (draws, n), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64)
    return counts.scatter_add_(1, picks, torch.ones_like(counts))
