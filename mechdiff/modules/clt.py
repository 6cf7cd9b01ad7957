"""CLTMap: affine maps from base's states to tuned's states, in closed form.

1. The training split is read once and kept as sums, one per site and group of positions
   (`mechdiff.modules.clt_fit`).
2. When the validation split has been read the maps are solved for, and lambda is chosen.
3. On request, the same sums give a ridge map from every source site to every target site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from mechdiff.config import LAMBDA_GRID, SEED
from mechdiff.errors import FitError
from mechdiff.functional.clt import AffineMap, Shrink, mean_shift_map, ridge_path, spectrum
from mechdiff.functional.moments import Moments, check_equal_widths
from mechdiff.functional.stats import generator
from mechdiff.interventions.sites import POSITIONS
from mechdiff.modules.clt_fit import CellFit, Estimator, Solver
from mechdiff.modules.clt_report import report, report_matrix
from mechdiff.modules.maps import AffineMaps, Batch, Cell
from mechdiff.results import Record


class CLTMap(AffineMaps):
    """Maps in closed form: ridge, reduced-rank ridge or scaled orthogonal Procrustes.

    Args:
        sites: Target sites, such as ``resid_post.12``.
        source_sites: Source site of each target site; the same sites by default.
        positions: Groups of positions that get maps of their own.
        d_source: Width of the source, read from its store.
        d_target: Width of the target, read from its store.
        noise: Share of the target's variance below which a difference is rounding of the stored states.
        solver: The estimator.
        shrink: What lambda → ∞ leads to: ``identity`` (equal widths) or ``zero``.
        lambdas: Ridge strengths to choose from, relative to the mean variance of a source dimension.
        rank: Rank of the map (of what it adds to the identity), for ``reduced_rank``.
        matrix: Also fit and report a ridge map, shrunk to zero, from every source site to every target site.
        seed: Seed of shuffling and resampling.

    Raises:
        FitError: If a rank, a lambda or the widths do not allow the map.
    """

    cross_weight: Tensor
    cross_bias: Tensor
    cross_chosen: Tensor

    def __init__(
        self,
        sites: Sequence[str] = (),
        source_sites: Sequence[str] | None = None,
        positions: Sequence[str] = POSITIONS,
        d_source: int = 1,
        d_target: int = 1,
        noise: float = 0.0,
        solver: Solver = "ridge",
        shrink: Shrink = "identity",
        lambdas: Sequence[float] = LAMBDA_GRID,
        rank: int | None = None,
        matrix: bool = False,
        seed: int = SEED,
    ) -> None:
        super().__init__(sites, source_sites, positions, d_source, d_target, noise, shrink, seed)
        self.save_hyperparameters()
        self.automatic_optimization = False
        _check_estimator(solver, lambdas, rank, d_source, d_target)
        self.estimator = Estimator(solver, shrink, tuple(lambdas), rank)
        self.solver_name: str = solver
        self.matrix = matrix
        if matrix:  # a test from a checkpoint needs these maps too
            crossed = (len(self.sites), *self.chosen.shape)
            self.register_buffer("cross_weight", torch.zeros(*crossed, d_source, d_target))
            self.register_buffer("cross_bias", torch.zeros(*crossed, d_target))
            self.register_buffer("cross_chosen", torch.full(crossed, -1))
        self._fits: dict[Cell, CellFit] = {}
        self._crossed: dict[Cell, Moments] = {}

    @classmethod
    def operations(
        cls, rows: int, sites: int, d_source: int, d_target: int, matrix: bool = False
    ) -> float | None:
        """Return the operations of the sums over rows, and of a decomposition for each group of positions."""
        sums = 2.0 * rows * d_source * (d_source + d_target)
        pairs = sites * (2 + (sites - 1) * matrix)  # a map and its control, and the pairs of other sites
        return pairs * sums + 10.0 * sites * len(POSITIONS) * d_source**3

    def setup(self, stage: str) -> None:
        """Refuse several processes, each of which would see a part of the rows.

        Raises:
            FitError: If there is more than one.
        """
        super().setup(stage)
        self.alone("for a closed form", " (extract ahead with `mechdiff extract`)")

    def configure_optimizers(self) -> None:
        """Have no optimizer: the maps are solved for."""

    def pairs(self) -> list[tuple[int, int]]:
        """Return the source and target sites that are looked at together, by index."""
        every = range(len(self.sites))
        return [(s, t) for s in every for t in every] if self.matrix else super().pairs()

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters that a checkpoint must share with the module it is loaded into."""
        own = {"solver": self.solver_name, "lambdas": list(self.estimator.lambdas)}
        return {**super().settings(), **own, "rank": self.estimator.rank, "matrix": self.matrix}

    def params(self, site: int, group: int) -> dict[str, Any]:
        """Return what identifies the map of a site and group in its records."""
        lambda_ = self._lambda(int(self.chosen[site, group]))
        return {**super().params(site, group), "lambda_": lambda_, "k": self.estimator.rank}

    def flags(self, site: int, group: int) -> tuple[str, ...]:
        """Return warnings about the map of a site and group."""
        return self._edge(int(self.chosen[site, group]))

    def on_train_epoch_start(self) -> None:
        """Forget the sums of an earlier epoch, whose rows were the same."""
        self._fits.clear()
        self._crossed.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        for cell, x, y in self.cells(batch):
            if cell[0] != cell[1]:
                self.add(self._crossed, cell, x, y)
                continue
            if cell not in self._fits:
                self._fits[cell] = CellFit(self.d_source, self.d_target, x.device)
            draws = generator(self.seed, "shuffled", *cell, batch_idx)
            self._fits[cell].add(x, y, self.estimator.shrink, draws)

    def on_validation_epoch_end(self) -> None:
        """Solve, choose lambda and log how well the maps predict."""
        super().on_validation_epoch_end()
        if self.matrix and not self.trainer.sanity_checking:
            self._solve_matrix()

    def solve(self, site: int, group: int, validation: Moments) -> None:
        """Fit the map of one site and group, and its controls.

        Args:
            site: Index of the site.
            group: Index into ``positions``.
            validation: Moments of the validation rows.

        Raises:
            FitError: If there are fewer than 2 training rows.
        """
        fit = self._fits.get((site, site, group))
        if fit is None or fit.moments.n < 2:
            raise self.no_rows("training", site, group)
        solution = fit.solve(validation, self.estimator)
        self.keep(site, group, "mapped", solution.mapped)
        self.keep(site, group, "shuffled", solution.shuffled)
        if self.equal_widths:
            self.shift[site, group] = mean_shift_map(fit.moments).bias.to(self.shift)
        self.chosen[site, group] = solution.chosen

    def cross(
        self, source: int, target: int, group: int
    ) -> tuple[AffineMap, dict[str, Any], tuple[str, ...]]:
        """Return a map of the matrix, what identifies it in its record, and warnings about it."""
        cell = (source, target, group)
        chosen = int(self.cross_chosen[cell])
        params = {
            "solver": "ridge",
            "shrink": "zero",
            "matrix": True,
            "lambda_": self.estimator.lambdas[chosen],
        }
        params["source_site"] = self.sources[source]
        return AffineMap(self.cross_weight[cell], self.cross_bias[cell]), params, self._edge(chosen)

    def records(self) -> Iterator[Record]:
        """Return R², R² of the difference, CKA and cosine of every map and control on the test split."""
        yield from report(self)
        if self.matrix:
            yield from report_matrix(self)

    def _solve_matrix(self) -> None:
        """Fit a map between any two sites; shrunk to zero, as states of two layers are not near-copies."""
        estimator = Estimator("ridge", "zero", self.estimator.lambdas, None)
        for group in range(len(self.positions)):
            shared = [spectrum(self._fits[s, s, group].moments) for s in range(len(self.sites))]
            for s, t in self.pairs():
                cell = (s, t, group)
                moments = self._fits[cell].moments if s == t else self._crossed[cell]
                path = ridge_path(moments, estimator.lambdas, shrink="zero", source=shared[s])
                best = estimator.choose(path, self._validation[cell])
                affine = path.map(best)
                self.cross_weight[cell] = affine.weight.to(self.shift)
                self.cross_bias[cell] = affine.bias.to(self.shift)
                self.cross_chosen[cell] = best

    def _lambda(self, chosen: int) -> float | None:
        return None if self.solver_name == "procrustes" else self.estimator.lambdas[chosen]

    def _edge(self, chosen: int) -> tuple[str, ...]:
        grid, lambda_ = self.estimator.lambdas, self._lambda(chosen)
        edge = len(set(grid)) > 1 and lambda_ in (min(grid), max(grid))
        return ("lambda_at_edge",) if edge else ()


def _check_estimator(
    solver: str, lambdas: Sequence[float], rank: int | None, d_source: int, d_target: int
) -> None:
    if solver not in get_args(Solver):
        raise FitError(f"model.solver is {solver!r}; allowed: {', '.join(get_args(Solver))}")
    if solver == "procrustes":
        check_equal_widths(d_source, d_target)
    largest = min(d_source, d_target)
    if (solver == "reduced_rank") != (rank is not None) or (rank is not None and not 1 <= rank <= largest):
        allowed = f"1 to {largest} with reduced_rank, else none"
        raise FitError(f"model.rank is {rank} with solver {solver}; allowed: {allowed}")
    if not lambdas or not all(math.isfinite(lambda_) and lambda_ >= 0 for lambda_ in lambdas):
        raise FitError(f"model.lambdas is {list(lambdas)}; allowed: one or more finite numbers, none below 0")
