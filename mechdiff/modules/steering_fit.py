"""Fit the handles of one site in closed form, from the training rows of both classes.

1. `paired_svd`: the uncentred SVD of tuned − base on target prompts.
2. `diff_mean`: the difference of two means; `diff_mean_svd`: that direction first, then the leading
   directions of tuned − base orthogonal to it; `whitened`: that difference against the scatter of both sets.
   The two sets are tuned's states on target and on neutral prompts, or tuned's and base's on target prompts.
3. Every direction points the way of the difference in means, so that adding it means the same everywhere.
4. A ridge map from base's to tuned's states on all prompts says where a state would be moved.

Source of the estimators: `mechdiff.functional.steering`, `mechdiff.functional.clt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechdiff.functional.clt import AffineMap, ridge_path, ridge_path_rows
from mechdiff.functional.moments import Moments
from mechdiff.functional.steering import (
    complete,
    difference_in_means,
    paired_svd,
    svd_around_direction,
    whitened_directions,
)
from mechdiff.modules.clt_fit import Estimator

Subspace = Literal["paired_svd", "diff_mean", "diff_mean_svd", "whitened"]
Contrast = Literal["classes", "models"]
LINES: tuple[str, ...] = ("diff_mean", "whitened")
"""Solvers that find one direction."""
FACTOR = 64
"""Most directions of base's covariance that random subspaces are mixed from."""


class Rows(NamedTuple):
    """Paired rows of one site.

    Attributes:
        base: `(rows, d)`.
        tuned: `(rows, d)`.
        target: Whether the prompt is a target, `(rows,)`, boolean.
        prompt: Index of the prompt, `(rows,)`.
    """

    base: Tensor
    tuned: Tensor
    target: Tensor
    prompt: Tensor

    @property
    def change(self) -> Tensor:
        """Tuned − base on target prompts, `(targets, d)`, float64."""
        return (self.tuned.to(torch.float64) - self.base.to(torch.float64))[self.target]


class Handles(NamedTuple):
    """What is known of one site; float64.

    Attributes:
        bases: Orthonormal rows by solver, `(k, d)`.
        delta: Difference in means, not normalised, `(d,)`.
        neutral_tuned: Mean of tuned's neutral states, `(d,)`.
        affine: Ridge map from base's to tuned's states.
        chosen: Index of its lambda.
        factor: F with FᵀF the covariance of base's states up to `FACTOR` directions, `(r, d)`.
    """

    bases: dict[str, Tensor]
    delta: Tensor
    neutral_tuned: Tensor
    affine: AffineMap
    chosen: int
    factor: Tensor


@dataclass(frozen=True)
class Recipe:
    """How handles are fitted.

    Attributes:
        solvers: Those wanted.
        k: Rank, for solvers of more than one direction.
        contrast: Which two sets the means are of.
        shrinkage: Of the scatter, for `whitened`.
        lambdas: Grid of the ridge map.
    """

    solvers: Sequence[str]
    k: int
    contrast: Contrast
    shrinkage: float
    lambdas: Sequence[float]

    def rank(self, solver: str) -> int:
        """Return the number of directions of a solver."""
        return 1 if solver in LINES else self.k


def fit(rows: Rows, validation: Rows, recipe: Recipe) -> Handles:
    """Fit the handles of one site.

    Args:
        rows: Training rows, of both classes.
        validation: Rows that choose lambda.
        recipe: How to fit.

    Raises:
        FitError: If the rows do not allow a handle or the map.
    """
    base, tuned = rows.base.to(torch.float64), rows.tuned.to(torch.float64)
    neutral = ~rows.target
    positive = tuned[rows.target]
    negative = tuned[neutral] if recipe.contrast == "classes" else base[rows.target]
    delta = difference_in_means(positive, negative)
    bases = {name: _basis(name, rows.change, positive, negative, delta, recipe) for name in recipe.solvers}
    affine, chosen = _map(base, tuned, validation, recipe)
    centred = base - base.mean(0)
    _, values, vectors = torch.linalg.svd(centred / max(len(base) - 1, 1) ** 0.5, full_matrices=False)
    return Handles(
        bases={name: _towards(basis, delta) for name, basis in bases.items()},
        delta=delta,
        neutral_tuned=tuned[neutral].mean(0),
        affine=affine,
        chosen=chosen,
        factor=_towards(values[:, None] * vectors, torch.zeros_like(delta))[:FACTOR],
    )


def energy(basis: Tensor, change: Tensor) -> Tensor:
    """Return the share of squared changes inside the first 1, 2, ... k directions, `(k,)`; 0 if none changed.

    Args:
        basis: `(k, d)`.
        change: `(rows, d)`.
    """
    total = change.square().sum()
    inside = (change @ basis.to(change).mT).square().sum(0).cumsum(0)
    return inside / total if total > 0 else inside


def _basis(
    solver: str, change: Tensor, positive: Tensor, negative: Tensor, delta: Tensor, recipe: Recipe
) -> Tensor:
    k = recipe.rank(solver)
    if solver == "paired_svd":
        return paired_svd(change, k).basis
    if not delta.norm() > 0:  # no difference, no direction: any will do, and adding it is adding 0
        return complete(delta.new_zeros(0, len(delta)), k)
    if solver == "diff_mean":
        return (delta / delta.norm())[None]
    if solver == "whitened":
        return whitened_directions(positive, negative, recipe.shrinkage)[None]
    return svd_around_direction(delta, change, k)


def _towards(basis: Tensor, delta: Tensor) -> Tensor:
    """Turn every row towards `delta`; one orthogonal to it, so that its largest entry is positive."""
    along, largest = basis @ delta, basis.gather(1, basis.abs().argmax(1, keepdim=True))[:, 0]
    sided = along.abs() > 1e-9 * delta.norm()
    return torch.where(torch.where(sided, along, largest) < 0, -1.0, 1.0)[:, None] * basis


def _map(base: Tensor, tuned: Tensor, validation: Rows, recipe: Recipe) -> tuple[AffineMap, int]:
    estimator = Estimator("ridge", "identity", recipe.lambdas, None)
    if len(base) < base.shape[1]:
        path = ridge_path_rows(base, tuned, recipe.lambdas, shrink="identity")
    else:
        path = ridge_path(Moments.of(base, tuned), recipe.lambdas, shrink="identity")
    chosen = estimator.choose(path, Moments.of(validation.base, validation.tuned))
    return path.map(chosen), chosen
