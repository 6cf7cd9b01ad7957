"""Compare subspaces, draw random ones, and read off how small a handle may be.

1. Principal angles come from singular values: of the sines below 45°, of the cosines above, since either
   loses half of the digits where it is flat.
2. A random subspace is the span of Gaussian rows; mixing the rows of a factor F gives them the covariance
   FᵀF, so that a control lies where states vary.

Source: Björck and Golub 1973 (Mathematics of Computation 27), section 3 (angles); Hanley and McNeil 1982
(Radiology 143) for the area under the curve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechdiff.errors import FitError


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Compute the angles between two subspaces.

    Args:
        a: Rows that span the one, `(k, d)`, linearly independent.
        b: Rows that span the other, `(m, d)`.

    Returns:
        Degrees, ascending, `(min(k, m),)`, float64.

    >>> plane, line = torch.eye(3)[:2], torch.tensor([[0.0, 1.0, 1.0]])
    >>> [round(angle, 6) for angle in principal_angles(plane, line).tolist()]
    [45.0]
    """
    assert a.shape[1] == b.shape[1], f"widths {a.shape[1]} and {b.shape[1]} differ"
    large, small = (a, b) if len(a) >= len(b) else (b, a)
    x, y = (torch.linalg.qr(rows.detach().to(torch.float64).mT).Q.mT for rows in (large, small))
    inner = y @ x.mT
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(y - inner @ x).clamp(max=1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos()).rad2deg()


def random_basis(k: int, d: int, generator: torch.Generator, factor: Tensor | None = None) -> Tensor:
    """Draw a random subspace.

    Args:
        k: Rank.
        d: Width of the states.
        generator: Source of the draw, on the CPU.
        factor: `(r, d)` with FᵀF the wanted covariance of the directions; None draws them isotropically.

    Returns:
        Orthonormal rows, `(k, d)`, float64, on the CPU.

    Raises:
        FitError: If k exceeds d, or the rank of the factor.

    >>> basis = random_basis(2, 5, torch.Generator().manual_seed(0))
    >>> torch.allclose(basis @ basis.mT, torch.eye(2).double())
    True
    """
    if not 1 <= k <= d:
        raise FitError(f"k is {k}; allowed: 1 to {d}, the width of the states (key: k)")
    if factor is None:
        rows = torch.randn(k, d, dtype=torch.float64, generator=generator)
    else:
        assert factor.shape[1] == d, f"a factor of width {factor.shape[1]} for states of width {d}"
        draws = torch.randn(k, len(factor), dtype=torch.float64, generator=generator)
        rows = draws @ factor.detach().to("cpu", torch.float64)
    found = torch.linalg.qr(rows.mT)
    size = found.R.diagonal().abs()
    if not size.min() > d * torch.finfo(torch.float64).eps * size.max():
        raise FitError(
            f"k is {k}; allowed: at most the rank of the factor that draws are mixed from (key: k)"
        )
    return found.Q.mT


def minimal_k(ks: Sequence[int], values: Sequence[float | None], threshold: float) -> int | None:
    """Return the smallest rank whose value reaches a threshold, None if there is none.

    Args:
        ks: Ranks, in any order.
        values: One number per rank, None where there is none.
        threshold: What must be reached.

    >>> minimal_k([4, 1, 2], [0.5, 0.1, 0.3], 0.25), minimal_k([1, 2], [0.1, None], 0.25)
    (2, None)
    """
    assert len(ks) == len(values), f"{len(ks)} ranks and {len(values)} values"
    reached = [k for k, value in zip(ks, values, strict=True) if value is not None and value >= threshold]
    return min(reached, default=None)


def reach_at_cost(costs: Sequence[float], limit: float) -> float:
    """Return how far along a line of growing strength one gets at a price, between measured points.

    Args:
        costs: What each point costs, the weakest first; nothing is done before it, at no cost.
        limit: The price.

    Returns:
        The largest place whose cost, linear between points, stays within the price: 0 is nothing done, 1 the
        first point, 1.5 halfway to the second.

    >>> reach_at_cost([0.1, 0.3], 0.2), reach_at_cost([0.1, 0.3], 0.05), reach_at_cost([0.1], -0.1)
    (1.5, 0.5, 0.0)
    """
    line = [0.0, *costs]
    if line[-1] <= limit:
        return float(len(costs))
    for i in range(len(costs), 0, -1):
        low, high = line[i - 1], line[i]
        if low <= limit < high:
            return i - 1 + (limit - low) / (high - low)
    return 0.0


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Compute how often a positive scores above a negative; a tie counts half.

    Args:
        scores: `(n,)`.
        labels: `(n,)`, positive where true or 1.

    Raises:
        FitError: If there is no positive or no negative.

    >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0, 0, 1, 1]))
    0.875
    """
    assert scores.shape == labels.shape, f"{tuple(scores.shape)} scores for {tuple(labels.shape)} labels"
    assert bool(scores.isfinite().all()), "scores must be finite"
    positive = labels.bool().cpu()
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        raise FitError(f"{p} positives and {n} negatives have no AUROC; allowed: at least 1 of each")
    _, inverse, counts = scores.detach().cpu().double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts - 1) / 2  # equal scores share their mean rank
    return float((ranks[inverse][positive].sum() - p * (p + 1) / 2) / (p * n))
