"""Linear maps that carry the states of one model to those of another.

1. Centre source and target on their means; C = xx/n is the source covariance and B = xy/n the cross
   covariance.
2. Ridge: W = (C + λ·tr(C)/d · I)⁻¹ B. λ is relative to the mean variance of a source dimension, so it depends
   on neither rows nor scale.
3. Shrinking to the identity fits y − x the same way and adds I to W: λ → ∞ predicts a mean shift, not the
   mean.
4. One eigendecomposition C = V diag(e) Vᵀ serves every λ: W = V diag(1/(e + λ·tr(C)/d)) Vᵀ B. With fewer rows
   than dimensions V and e come from the rows themselves (the dual form), in their span only.
5. Reduced rank: project the ridge weight on the leading right singular vectors of (C + λ·tr(C)/d · I)^½ W.
6. Procrustes: the rotation U Vᵀ of xy = U S Vᵀ, times tr(S)/tr(xx).

Source: Hoerl and Kennard 1970 (Technometrics 12), section 2; Mukherjee and Zhu 2011 (Statistical Analysis
and Data Mining 4), section 2 (reduced-rank ridge); Schönemann 1966 (Psychometrika 31) and Schönemann and
Carroll 1970 (Psychometrika 35) for Procrustes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechdiff.errors import FitError
from mechdiff.functional.moments import Moments, check_equal_widths

Shrink = Literal["identity", "zero"]


class AffineMap(NamedTuple):
    """The map x ↦ x·weight + bias.

    Attributes:
        weight: `(d_in, d_out)`.
        bias: `(d_out,)`.
    """

    weight: Tensor
    bias: Tensor


class Spectrum(NamedTuple):
    """Eigenvalues `(r,)` and eigenvectors `(d_in, r)` of a source covariance."""

    values: Tensor
    vectors: Tensor


def map_states(states: Tensor, affine: AffineMap) -> Tensor:
    """Apply a map to the last axis, in float32 or better.

    Args:
        states: `(..., d_in)`.
        affine: The map.

    Returns:
        `(..., d_out)` in the dtype of `states`.

    >>> map_states(torch.tensor([1.0, 2.0]), AffineMap(torch.eye(2), torch.tensor([0.0, 1.0]))).tolist()
    [1.0, 3.0]
    """
    dtype = torch.promote_types(torch.promote_types(states.dtype, affine.weight.dtype), torch.float32)
    return (states.to(dtype) @ affine.weight.to(dtype) + affine.bias.to(dtype)).to(states.dtype)


def identity_map(width: int) -> AffineMap:
    """Make the map that changes nothing.

    >>> map_states(torch.ones(2), identity_map(2)).tolist()
    [1.0, 1.0]
    """
    return AffineMap(torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))


def mean_shift_map(moments: Moments) -> AffineMap:
    """Make the map that adds the difference of the means.

    Raises:
        FitError: If source and target differ in width.

    >>> mean_shift_map(Moments.of(torch.zeros(2, 1), torch.ones(2, 1))).bias.tolist()
    [1.0]
    """
    shift = moments.delta().mean_y
    return AffineMap(torch.eye(len(shift), dtype=shift.dtype, device=shift.device), shift.clone())


@dataclass(frozen=True)
class RidgePath:
    """Ridge maps for a grid of λ, kept as one factorisation; a weight is formed only when asked for.

    Attributes:
        lambdas: The grid, relative to tr(C)/d.
        energy: Eigenvalues e of the source covariance, `(r,)`.
        basis: Eigenvectors V, `(d_in, r)`.
        rotated: Vᵀ B, `(r, d_out)`, of the target, or of target − source when shrinking to the identity.
        mean_x: `(d_in,)`.
        mean_y: Mean of what is fitted, `(d_out,)`.
        shrink: Where λ → ∞ leads.
    """

    lambdas: tuple[float, ...]
    energy: Tensor
    basis: Tensor
    rotated: Tensor
    mean_x: Tensor
    mean_y: Tensor
    shrink: Shrink

    def gains(self) -> Tensor:
        """Compute 1/(e + λ·tr(C)/d) for every λ, `(lambdas, r)`; 0 in directions without variance."""
        scale = self.energy.sum() / len(self.mean_x)
        lambdas = torch.tensor(self.lambdas, dtype=self.energy.dtype, device=self.energy.device)
        # Without variance there is no cross covariance, but its rounding would be divided by a small λ.
        floor = len(self.mean_x) * torch.finfo(self.energy.dtype).eps * self.energy.max()
        return torch.where(self.energy > floor, 1 / (self.energy + scale * lambdas[:, None]), 0.0)

    def map(self, index: int, rank: int | None = None) -> AffineMap:
        """Form the map for one λ of the grid.

        Args:
            index: Which λ.
            rank: Keep only this many directions of what is added to the shrinkage target.

        Raises:
            FitError: If `rank` is out of range.
        """
        gain = self.gains()[index]
        fitted = self.rotated
        if rank is not None:
            largest = min(len(self.mean_x), len(self.mean_y))
            if not 1 <= rank <= largest:
                raise FitError(f"rank={rank} must be in 1..{largest} (model.rank)")
            top = torch.linalg.svd(self.rotated * gain.sqrt()[:, None], full_matrices=False).Vh[:rank]
            fitted = fitted @ top.T @ top
        weight = self.basis @ (gain[:, None] * fitted)
        bias = self.mean_y - self.mean_x @ weight
        if self.shrink == "identity":
            weight = weight + torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return AffineMap(weight, bias)


def spectrum(moments: Moments) -> Spectrum:
    """Decompose the source covariance; targets that share a source can share it.

    Raises:
        FitError: If there are fewer than 2 rows.

    >>> spectrum(Moments.of(torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1))).values.tolist()
    [1.0]
    """
    _check_rows(moments)
    values, vectors = torch.linalg.eigh(moments.xx / moments.n)
    return Spectrum(values.clamp_min(0), vectors)


def ridge_path(
    moments: Moments, lambdas: Sequence[float], *, shrink: Shrink = "identity", source: Spectrum | None = None
) -> RidgePath:
    """Fit ridge maps for a grid of λ from moments, with one eigendecomposition.

    Args:
        moments: Of the rows to fit on.
        lambdas: Strengths relative to tr(C)/d, each at least 0. At 0, directions without variance are left
            out.
        shrink: Where λ → ∞ leads: `identity` (a mean shift; equal widths) or `zero` (the mean).
        source: The decomposition of these moments' source, if it is known.

    Returns:
        The path; memory d_in² + d_in·d_out, whatever the length of the grid.

    Raises:
        FitError: If a λ is negative or not finite, there are fewer than 2 rows, or widths differ under
            `identity`.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> ridge_path(Moments.of(x, 3 * x + 1), [0.0, 1.0], shrink="zero").map(1).weight.tolist()
    [[1.5]]
    """
    source = source or spectrum(moments)
    target = _fitted(moments, shrink)
    rotated = source.vectors.T @ (target.xy / target.n)
    return RidgePath(
        _checked(lambdas), source.values, source.vectors, rotated, target.mean_x, target.mean_y, shrink
    )


def ridge_path_rows(x: Tensor, y: Tensor, lambdas: Sequence[float], *, shrink: Shrink = "zero") -> RidgePath:
    """Fit the same path from rows in the dual form; cheaper when rows are fewer than dimensions.

    Args:
        x: `(rows, d_in)`.
        y: `(rows, d_out)`.
        lambdas: As in `ridge_path`.
        shrink: As in `ridge_path`.

    Raises:
        FitError: As in `ridge_path`.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> ridge_path_rows(x, x[:, :1], [0.0]).map(0).weight.round(decimals=9).tolist()
    [[1.0], [0.0]]
    """
    assert len(x) == len(y), f"{len(x)} rows against {len(y)}"
    x, y = x.detach().to(torch.float64), y.detach().to(torch.float64)
    if shrink == "identity":
        check_equal_widths(x.shape[1], y.shape[1])
        y = y - x
    if len(x) < 2:
        raise FitError(f"a map over {len(x)} rows is undefined; at least 2 are needed")
    mean_x, mean_y = x.mean(0), y.mean(0)
    left, singular, right = torch.linalg.svd((x - mean_x) / math.sqrt(len(x)), full_matrices=False)
    rotated = singular[:, None] * (left.T @ (y - mean_y)) / math.sqrt(len(x))
    return RidgePath(_checked(lambdas), singular.square(), right.T, rotated, mean_x, mean_y, shrink)


def fit_ridge(x: Tensor, y: Tensor, lambda_: float = 1e-2, *, shrink: Shrink = "zero") -> AffineMap:
    """Fit one ridge map to rows, in the primal or the dual form, whichever is smaller.

    Args:
        x: `(rows, d_in)`.
        y: `(rows, d_out)`.
        lambda_: Strength relative to tr(C)/d.
        shrink: As in `ridge_path`.

    Raises:
        FitError: As in `ridge_path`.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> [t.round(decimals=9).tolist() for t in fit_ridge(x, 3 * x + 1, 0.0)]
    [[[3.0]], [1.0]]
    """
    if len(x) < x.shape[1]:
        return ridge_path_rows(x, y, [lambda_], shrink=shrink).map(0)
    return ridge_path(Moments.of(x, y), [lambda_], shrink=shrink).map(0)


def reduced_rank(moments: Moments, rank: int, lambda_: float, *, shrink: Shrink = "identity") -> AffineMap:
    """Fit the best ridge map of at most this rank (plus the identity, when shrinking to it).

    Args:
        moments: Of the rows to fit on.
        rank: 1 to the smaller width.
        lambda_: Strength relative to tr(C)/d.
        shrink: As in `ridge_path`.

    Raises:
        FitError: If the rank or λ is out of range, or as in `ridge_path`.

    >>> x = torch.eye(3)
    >>> int(torch.linalg.matrix_rank(reduced_rank(Moments.of(x, x), 1, 1e-3, shrink="zero").weight))
    1
    """
    return ridge_path(moments, [lambda_], shrink=shrink).map(0, rank)


def procrustes(moments: Moments, *, scaled: bool = True) -> AffineMap:
    """Fit the best rotation (with reflections) between equal widths, about the means.

    Args:
        moments: Of the rows to fit on.
        scaled: Allow one common scale.

    Raises:
        FitError: If widths differ, there are fewer than 2 rows, or the source does not vary.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 1.0]])
    >>> procrustes(Moments.of(x, 2 * x.flip(1))).weight.round(decimals=6).abs().tolist()
    [[0.0, 2.0], [2.0, 0.0]]
    """
    _check_rows(moments)
    check_equal_widths(*moments.xy.shape)
    left, singular, right = torch.linalg.svd(moments.xy)
    weight = left @ right
    if scaled:
        energy = moments.xx.trace()
        if energy == 0:
            raise FitError(
                f"the source does not vary over {int(moments.n)} rows; a scale needs a source that varies"
            )
        weight = weight * (singular.sum() / energy)
    return AffineMap(weight, moments.mean_y - moments.mean_x @ weight)


def _fitted(moments: Moments, shrink: Shrink) -> Moments:
    """Moments of the target that a path fits: y, or y − x when shrinking to the identity."""
    assert shrink in ("identity", "zero"), shrink
    return moments.delta() if shrink == "identity" else moments


def _checked(lambdas: Sequence[float]) -> tuple[float, ...]:
    for lambda_ in lambdas:
        if not (math.isfinite(lambda_) and lambda_ >= 0):
            raise FitError(f"lambda_={lambda_} must be a finite number, at least 0 (model.lambdas)")
    assert lambdas, "an empty grid of lambdas"
    return tuple(lambdas)


def _check_rows(moments: Moments) -> None:
    if moments.n < 2:
        raise FitError(f"a map over {int(moments.n)} rows is undefined; at least 2 are needed")
    assert bool(moments.xy.isfinite().all()), "moments are not finite"
