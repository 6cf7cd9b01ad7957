"""How well a map predicts: squared errors and R², from rows or from moments.

1. R² = 1 − Σ|y − ŷ|² / Σ|y − ȳ|², pooled over dimensions (a ratio of sums) or one per dimension; ȳ is the
   mean of the rows it is measured on.
2. R² of the difference = 1 − Σ|y − ŷ|² / Σ|y − x|²: the identity map is its zero. Two models with a common
   backbone are so close that the identity alone has an R² near 1.
3. From moments, Σ(y − ŷ)² per dimension is yy − 2·diag(Wᵀxy) + diag(Wᵀ xx W) + n·(ȳ − x̄W − b)². In the
   eigenbasis of a ridge path that is a quadratic form in the gains 1/(e + λ·tr(C)/d), so all λ cost one
   rotation.

Sums per row (`sse_rows`) are what a bootstrap over prompts resamples: both R² are 1 − a ratio of such sums.
"""

from typing import Literal

import torch
from torch import Tensor

from mechdiff.errors import FitError
from mechdiff.functional.clt import AffineMap, RidgePath
from mechdiff.functional.moments import Moments


def sse_rows(pred: Tensor, target: Tensor) -> Tensor:
    """Sum squared errors over dimensions, in float64.

    Args:
        pred: `(rows, d_out)`, or `(d_out,)` for one prediction for all rows.
        target: `(rows, d_out)`.

    Returns:
        `(rows,)`.

    >>> sse_rows(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist()
    [25.0, 1.0]
    """
    return (target.to(torch.float64) - pred.to(torch.float64)).square().sum(-1)


def r2(pred: Tensor, target: Tensor, *, per_dim: bool = False) -> Tensor:
    """Compute R², pooled or per dimension, in float64.

    Args:
        pred: `(rows, d_out)`.
        target: `(rows, d_out)`.
        per_dim: Return one value per dimension; a constant dimension counts 1 if it is met exactly, else 0.

    Returns:
        A scalar or `(d_out,)`, at most 1.

    Raises:
        FitError: If the target does not vary at all.

    >>> target = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    >>> r2(target, target).item(), r2(target.mean(0).expand(2, 2), target, per_dim=True).tolist()
    (1.0, [0.0, 0.0])
    """
    pred, target = pred.to(torch.float64), target.to(torch.float64)
    return _r2((target - pred).square().sum(0), (target - target.mean(0)).square().sum(0), per_dim)


def r2_delta(pred: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Compute the R² of the difference between target and source: 0 for the identity, 1 for a perfect map.

    Args:
        pred: `(rows, d_model)`.
        source: `(rows, d_model)`.
        target: `(rows, d_model)`.

    Raises:
        FitError: If source and target are equal.

    >>> source, target = torch.zeros(2, 2), torch.ones(2, 2)
    >>> r2_delta(source, source, target).item(), r2_delta(target, source, target).item()
    (0.0, 1.0)
    """
    return _r2_delta(sse_rows(pred, target).sum(), sse_rows(source, target).sum())


def map_sse(affine: AffineMap, moments: Moments) -> Tensor:
    """Sum squared errors of a map per dimension, from moments alone.

    Args:
        affine: The map.
        moments: Of the rows it is judged on.

    Returns:
        `(d_out,)`.

    >>> rows = torch.tensor([[0.0], [2.0]])
    >>> map_sse(AffineMap(torch.ones(1, 1), torch.ones(1)), Moments.of(rows, rows)).tolist()
    [2.0]
    """
    weight, bias = affine.weight.to(torch.float64), affine.bias.to(torch.float64)
    offset = moments.mean_y - moments.mean_x @ weight - bias
    quadratic = (weight * (moments.xx @ weight - 2 * moments.xy)).sum(0)
    return (moments.yy + quadratic + moments.n * offset.square()).clamp_min(0)


def map_r2(
    affine: AffineMap,
    moments: Moments,
    *,
    baseline: Literal["mean", "identity"] = "mean",
    per_dim: bool = False,
) -> Tensor:
    """Compute the R² of a map from moments alone.

    Args:
        affine: The map.
        moments: Of the rows it is judged on.
        baseline: Compare with the mean (R²) or with the identity map (R² of the difference).
        per_dim: One value per dimension, for the baseline `mean` only.

    Returns:
        A scalar or `(d_out,)`.

    Raises:
        FitError: If the baseline has no error.

    >>> rows, affine = torch.tensor([[0.0], [2.0]]), AffineMap(2 * torch.ones(1, 1), torch.zeros(1))
    >>> map_r2(affine, Moments.of(rows, 2 * rows), baseline="identity").item()
    1.0
    """
    errors = map_sse(affine, moments)
    if baseline == "identity":
        assert not per_dim, "R² of the difference is pooled"
        return _r2_delta(errors.sum(), moments.gap().sum())
    return _r2(errors, moments.yy, per_dim)


def path_sse(path: RidgePath, moments: Moments) -> Tensor:
    """Sum squared errors of every map of a ridge path, from moments alone.

    Args:
        path: The fitted maps.
        moments: Of the rows they are judged on.

    Returns:
        `(lambdas,)`.

    >>> from mechdiff.functional.clt import ridge_path
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> moments = Moments.of(x, 2 * x)
    >>> path_sse(ridge_path(moments, [0.0, 1.0], shrink="zero"), moments).round(decimals=9).tolist()
    [0.0, 2.0]
    """
    seen = moments.delta() if path.shrink == "identity" else moments
    gains = path.gains()
    shift_x, shift_y = path.basis.T @ (seen.mean_x - path.mean_x), seen.mean_y - path.mean_y
    covariance = path.basis.T @ seen.xx @ path.basis + seen.n * torch.outer(shift_x, shift_x)
    linear = (path.rotated * (path.basis.T @ seen.xy)).sum(1) + seen.n * shift_x * (path.rotated @ shift_y)
    quadratic = covariance * (path.rotated @ path.rotated.T)
    total = seen.yy.sum() + seen.n * shift_y.square().sum()
    return (total - 2 * gains @ linear + ((gains @ quadratic) * gains).sum(1)).clamp_min(0)


def _r2(errors: Tensor, spread: Tensor, per_dim: bool) -> Tensor:
    if per_dim:
        exact = (errors == 0).to(errors.dtype)
        return torch.where(spread > 0, 1 - errors / spread.where(spread > 0, torch.ones_like(spread)), exact)
    if not spread.sum() > 0:
        raise FitError("R² is undefined: the target does not vary over the rows it is measured on")
    return 1 - errors.sum() / spread.sum()


def _r2_delta(errors: Tensor, gap: Tensor) -> Tensor:
    if not gap > 0:
        raise FitError(
            "R² of the difference is undefined: source and target are equal; choose a site that differs"
        )
    return 1 - errors / gap
