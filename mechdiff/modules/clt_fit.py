"""Fit one map in closed form, from the rows of one source site, one target site and one group of positions.

1. Rows are added batch by batch to second moments in float64. While they are fewer than dimensions they are
   kept as well, for the dual form.
2. A control sees the same source rows and the change (shrinking to zero: the state) of ANOTHER row: what the
   same solver, with the same lambda, finds where the change does not depend on the state.
3. The whole grid of lambda is judged on the moments of the validation rows, and the best is taken.

Source of the estimators: `mechdiff.functional.clt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechdiff.functional.clt import (
    AffineMap,
    RidgePath,
    Shrink,
    Spectrum,
    procrustes,
    ridge_path,
    ridge_path_rows,
)
from mechdiff.functional.moments import Moments
from mechdiff.functional.r2 import map_sse, path_sse

Solver = Literal["ridge", "reduced_rank", "procrustes"]


class Solution(NamedTuple):
    """A map, its control fitted to shuffled rows with the same lambda, and the index of that lambda."""

    mapped: AffineMap
    shuffled: AffineMap
    chosen: int


@dataclass(frozen=True)
class Estimator:
    """How a map is fitted.

    Attributes:
        solver: The estimator.
        shrink: What lambda → ∞ leads to.
        lambdas: The grid; unused by `procrustes`.
        rank: Rank of what is added to the shrinkage target, for `reduced_rank`.
    """

    solver: Solver
    shrink: Shrink
    lambdas: Sequence[float]
    rank: int | None

    def choose(self, path: RidgePath, validation: Moments) -> int:
        """Return the index of the lambda with the smallest error on the validation rows."""
        if self.rank is None:
            return int(path_sse(path, validation).argmin())
        errors = [map_sse(path.map(i, self.rank), validation).sum() for i in range(len(self.lambdas))]
        return int(torch.stack(errors).argmin())


class CellFit:
    """The training rows of one map.

    Args:
        d_source: Width of the source.
        d_target: Width of the target.
        device: Where sums are kept.
    """

    def __init__(self, d_source: int, d_target: int, device: torch.device) -> None:
        self.moments = Moments.zeros(d_source, d_target, device)
        self.shuffled = Moments.zeros(d_source, d_target, device)
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor, shrink: Shrink, draws: torch.Generator) -> None:
        """Add source rows `(rows, d_source)` and target rows `(rows, d_target)`; `draws` shuffles them."""
        x, y = x.to(torch.float64), y.to(torch.float64)
        other = other_rows(len(x), draws).to(x.device)
        control = x + (y - x)[other] if shrink == "identity" else y[other]
        self.moments.update(x, y)
        self.shuffled.update(x, control)
        if self.moments.n < x.shape[1]:
            self.rows.append((x, y, control))
        else:
            self.rows.clear()

    def solve(self, validation: Moments, estimator: Estimator) -> Solution:
        """Fit the map and its control.

        Args:
            validation: Moments of the rows that choose lambda.
            estimator: How to fit.

        Raises:
            FitError: If the rows do not allow the map.
        """
        if estimator.solver == "procrustes":
            return Solution(procrustes(self.moments), procrustes(self.shuffled), 0)
        mapped, shuffled = self._paths(estimator)
        best = estimator.choose(mapped, validation)
        return Solution(mapped.map(best, estimator.rank), shuffled.map(best, estimator.rank), best)

    def _paths(self, estimator: Estimator) -> tuple[RidgePath, RidgePath]:
        """The ridge path of the map and that of its control; both have the same source rows."""
        grid, shrink = estimator.lambdas, estimator.shrink
        if self.moments.n < len(self.moments.mean_x):
            x, y, control = (torch.cat(part) for part in zip(*self.rows, strict=True))
            return ridge_path_rows(x, y, grid, shrink=shrink), ridge_path_rows(
                x, control, grid, shrink=shrink
            )
        mapped = ridge_path(self.moments, grid, shrink=shrink)
        source = Spectrum(mapped.energy, mapped.basis)
        return mapped, ridge_path(self.shuffled, grid, shrink=shrink, source=source)


def other_rows(count: int, draws: torch.Generator) -> Tensor:
    """Return, for each of `count` rows, the index of another one, `(count,)`; a single row has only itself.

    The indices form one random cycle: a plain permutation would leave some rows, and most rows of a small
    batch, where they are.
    """
    order = torch.randperm(count, generator=draws)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other
