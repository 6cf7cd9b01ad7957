"""CLTMap: affine maps from base's states to tuned's states, one per site and group of positions.

1. The training split is read once and kept as second moments in float64; below as many rows as dimensions, as the rows themselves (dual form).
2. When the validation split has been read the whole grid of lambda is fitted and judged from moments; the best is kept.
3. The test split is predicted by the map and by its controls: the identity, the mean shift, a map fitted to shuffled rows, another layer's map.
4. A shuffled map keeps every row's own state and is fitted to the change of ANOTHER row (shrinking to zero: to the state of another row): what
   the same solver finds where the change does not depend on the state.

Source of the estimators: ``mechdiff.functional.clt``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechdiff.config import LAMBDA_GRID, SEED
from mechdiff.errors import CheckpointError, FitError
from mechdiff.functional.clt import (
    AffineMap,
    RidgePath,
    Shrink,
    Spectrum,
    map_states,
    mean_shift_map,
    procrustes,
    ridge_path,
    ridge_path_rows,
)
from mechdiff.functional.moments import Moments, check_equal_widths
from mechdiff.functional.r2 import map_sse, path_sse
from mechdiff.functional.stats import generator
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.modules.base import UNTOUCHED, DiffModule
from mechdiff.modules.clt_report import Case, report
from mechdiff.results import Record

if TYPE_CHECKING:
    from mechdiff.interventions.hooks import Edit

Solver = Literal["ridge", "reduced_rank", "procrustes"]
KINDS = ("raw", "mapped", "mean_shift", "shuffled", "wrong_layer", "self")
"""What an edit writes: the donor's state as it is, mapped, under a control's map, or the recipient's own."""

Batch = Mapping[str, Any]
Cell = tuple[int, int, int]  # source site, target site, group of positions


class CLTMap(DiffModule):
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
        matrix: Also report every source site against every target site.
        seed: Seed of shuffling and resampling.

    Raises:
        FitError: If a rank, a lambda or the widths do not allow the map.
    """

    question = "rq2"
    mapped_weight: Tensor
    mapped_bias: Tensor
    shuffled_weight: Tensor
    shuffled_bias: Tensor
    shift: Tensor
    chosen: Tensor

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
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.sites, self.sources = list(sites), list(source_sites or sites)
        self.positions = [name for name in POSITIONS if name in positions]
        if set(positions) - set(POSITIONS) or not self.positions:
            raise FitError(f"model.positions is {list(positions)}; allowed: {', '.join(POSITIONS)}")
        if len(self.sources) != len(self.sites):
            raise FitError(
                f"model.source_sites has {len(self.sources)} entries for {len(self.sites)} sites; they must be as many"
            )
        if solver == "procrustes" or shrink == "identity":
            check_equal_widths(d_source, d_target)
        if (solver == "reduced_rank") != (rank is not None) or (
            rank is not None and not 1 <= rank <= min(d_source, d_target)
        ):
            raise FitError(
                f"model.rank is {rank} with solver {solver}; allowed: 1 to {min(d_source, d_target)} with reduced_rank, else none"
            )
        if not lambdas or min(lambdas) < 0:
            raise FitError(f"model.lambdas is {list(lambdas)}; allowed: at least one number, none below 0")
        self.solver_name, self.shrink, self.lambdas, self.rank = solver, shrink, tuple(lambdas), rank
        self.noise, self.matrix, self.seed = noise, matrix, seed
        self.equal_widths = d_source == d_target
        cells = (len(self.sites), len(self.positions))
        for kind in ("mapped", "shuffled"):
            self.register_buffer(f"{kind}_weight", torch.zeros(*cells, d_source, d_target))
            self.register_buffer(f"{kind}_bias", torch.zeros(*cells, d_target))
        self.register_buffer("shift", torch.zeros(*cells, d_target))
        self.register_buffer("chosen", torch.full(cells, -1))
        self._fit: dict[Cell, Moments] = {}
        self._validation: dict[Cell, Moments] = {}
        self._shuffled: dict[Cell, Moments] = {}
        self._rows: dict[Cell, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._test: list[Batch] = []

    @property
    def fitted(self) -> bool:
        """Whether maps have been fitted or loaded."""
        return bool((self.chosen >= 0).all())

    @property
    def has_path(self) -> bool:
        """Whether a lambda was chosen."""
        return self.solver_name in ("ridge", "reduced_rank")

    def affine(self, site: int, group: int, kind: str = "mapped") -> AffineMap:
        """Return one map.

        Args:
            site: Index of the site.
            group: Index into ``positions``.
            kind: ``mapped``, ``shuffled``, ``mean_shift``, or ``wrong_layer``: the map fitted at the next site.
        """
        if kind == "mean_shift":
            return AffineMap(
                torch.eye(self.shift.shape[-1], device=self.shift.device), self.shift[site, group]
            )
        if kind == "wrong_layer":
            site, kind = (site + 1) % len(self.sites), "mapped"
        return AffineMap(
            getattr(self, f"{kind}_weight")[site, group], getattr(self, f"{kind}_bias")[site, group]
        )

    def controls(self) -> list[str]:
        """Return the controls that these sites and widths allow."""
        return ["shuffled"] + ["mean_shift"] * self.equal_widths + ["wrong_layer"] * (len(self.sites) > 1)

    def forward(self, source: Tensor, site: int = 0, group: int = 0) -> Tensor:
        """Map source states ``(..., d_source)`` of one site and group to ``(..., d_target)``."""
        return map_states(source, self.affine(site, group))

    def edits(self, donor: Mapping[Site, Tensor] | None, where: Tensor, **cell: Any) -> Mapping[Site, Edit]:
        """Return the replacement of one site's states by the donor's.

        Args:
            donor: ``{source site: (batch, position, d_source)}`` in the recipient's rows.
            where: Index into ``POSITIONS``, ``(batch, position)``; ``UNTOUCHED`` keeps the recipient's state.
            **cell: ``site``, a target site of this module, and ``kind``, one of ``KINDS``.
        """
        site, kind = cell["site"], cell["kind"]
        assert kind in KINDS, kind
        index = self.sites.index(str(site))
        if kind == "self":
            return {}
        assert donor is not None
        states = donor[Site.parse(self.sources[index])]

        def edit(activation: Tensor, _positions: Tensor) -> Tensor:
            if kind == "raw":
                return torch.where((where != UNTOUCHED)[..., None], states.to(activation), activation)
            for group, name in enumerate(self.positions):
                mapped = map_states(states.to(activation), self.affine(index, group, kind))
                activation = torch.where((where == POSITIONS.index(name))[..., None], mapped, activation)
            return activation

        return {site: edit}

    # --- fitting ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer | None:
        """Have no optimizer: the maps are solved for."""
        return None  # noqa: RET501 - the subclass has one

    def on_fit_start(self) -> None:
        """Refuse several processes, whose padded rows would be counted twice."""
        if self.trainer.world_size > 1:
            raise FitError(
                f"trainer.devices gives {self.trainer.world_size} processes; a closed form is fitted in 1 (extract ahead with `mechdiff extract`)"
            )
        for kept in (self._fit, self._validation, self._shuffled, self._rows):
            kept.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Add a batch to the moments."""
        for cell, x, y in self._cells(batch):
            self._add(self._fit, cell, x, y)
            if cell[0] == cell[1]:
                draws = generator(self.seed, "shuffled", *cell, batch_idx)
                order = torch.randperm(len(x), generator=draws).to(x.device)
                other = x + (y - x)[order] if self.shrink == "identity" else y[order]
                self._add(self._shuffled, cell, x, other)
                if self._fit[cell].n < x.shape[1]:  # few rows: keep them for the dual form
                    self._rows.setdefault(cell, []).append((x, y, other))
        return None  # noqa: RET501 - the subclass has a loss

    def on_validation_epoch_start(self) -> None:
        """Forget an earlier pass over the validation split."""
        self._validation.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the moments."""
        for cell, x, y in self._cells(batch):
            self._add(self._validation, cell, x, y)

    def on_validation_epoch_end(self) -> None:
        """Solve, choose lambda and log how well the maps predict."""
        if self.trainer.sanity_checking:
            return
        losses = []
        for site, name in enumerate(self.sites):
            for group, positions in enumerate(self.positions):
                self._solve(site, group)
                moments = self._validation[site, site, group]
                loss = map_sse(self.affine(site, group), moments).sum() / moments.yy.sum()
                self.log(f"val/{name}/{positions}/r2", 1 - loss)
                if self.equal_widths and moments.gap().sum() > self.noise * moments.yy.sum():
                    self.log(
                        f"val/{name}/{positions}/r2_delta", 1 - loss * moments.yy.sum() / moments.gap().sum()
                    )
                losses.append(loss)
        self.log("val/loss", torch.stack(losses).mean(), prog_bar=True)

    def _solve(self, site: int, group: int) -> None:
        cell = (site, site, group)
        moments, validation = self._fit.get(cell), self._validation.get(cell)
        if moments is None or validation is None or moments.n < 2:
            raise FitError(
                f"no rows at {self.sites[site]}, positions {self.positions[group]}; every split needs some (keys: data.tokens, data.val_frac)"
            )
        if not self.has_path:
            best, maps = 0, [procrustes(m) for m in (moments, self._shuffled[cell])]
        else:
            paths = self._paths(cell)
            errors = (
                path_sse(paths[0], validation)
                if self.rank is None
                else torch.stack(
                    [map_sse(paths[0].map(i, self.rank), validation).sum() for i in range(len(self.lambdas))]
                )
            )
            best = int(errors.argmin())
            maps = [path.map(best, self.rank) for path in paths]
        for kind, affine in zip(("mapped", "shuffled"), maps, strict=True):
            getattr(self, f"{kind}_weight")[site, group] = affine.weight.to(self.shift)
            getattr(self, f"{kind}_bias")[site, group] = affine.bias.to(self.shift)
        if self.equal_widths:
            self.shift[site, group] = mean_shift_map(moments).bias.to(self.shift)
        self.chosen[site, group] = best

    def _paths(self, cell: Cell) -> list[RidgePath]:
        """The path of the map and that of its shuffled control, at the same lambdas."""
        moments = self._fit[cell]
        if moments.n < len(moments.mean_x):
            x, y, other = (torch.cat(part) for part in zip(*self._rows[cell], strict=True))
            return [ridge_path_rows(x, target, self.lambdas, shrink=self.shrink) for target in (y, other)]
        true = ridge_path(moments, self.lambdas, shrink=self.shrink)
        return [
            true,
            ridge_path(
                self._shuffled[cell],
                self.lambdas,
                shrink=self.shrink,
                source=Spectrum(true.energy, true.basis),
            ),
        ]

    def _add(self, kept: dict[Cell, Moments], cell: Cell, x: Tensor, y: Tensor) -> None:
        if cell not in kept:
            kept[cell] = Moments.zeros(x.shape[1], y.shape[1], x.device)
        kept[cell].update(x, y)

    def _cells(self, batch: Batch) -> Iterable[tuple[Cell, Tensor, Tensor]]:
        """Yield the rows of a batch for each source site, target site and group."""
        for group, positions in enumerate(self.positions):
            rows = batch["group"] == POSITIONS.index(positions)
            if rows.any():
                for s, t in self._site_pairs():
                    yield (
                        (s, t, group),
                        batch["source"][self.sources[s]][rows],
                        batch["target"][self.sites[t]][rows],
                    )

    def _site_pairs(self) -> list[tuple[int, int]]:
        count = range(len(self.sites))
        return [(s, t) for s in count for t in count if self.matrix or s == t]

    # --- testing ---------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Refuse to test what was never fitted."""
        if not self.fitted:
            raise CheckpointError("this map has not been fitted; pass --ckpt_path with a checkpoint of a fit")
        self._test.clear()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the rows: the test split is small, and its intervals are drawn by prompt."""
        move = lambda part: {k: v.cpu() for k, v in part.items()}  # noqa: E731
        self._test.append(
            {
                "source": move(batch["source"]),
                "target": move(batch["target"]),
                "prompt": batch["prompt"].cpu(),
                "group": batch["group"].cpu(),
            }
        )

    def case(self, source: int, target: int, group: int) -> Case:
        """Return the test rows of one source site, target site and group, on the CPU."""
        parts = [(b, b["group"] == POSITIONS.index(self.positions[group])) for b in self._test]
        x = torch.cat([b["source"][self.sources[source]][rows] for b, rows in parts])
        y = torch.cat([b["target"][self.sites[target]][rows] for b, rows in parts])
        return Case(x, y, torch.cat([b["prompt"][rows] for b, rows in parts]))

    def cross_map(self, source: int, target: int, group: int) -> AffineMap:
        """Return the map between two sites of the matrix, lambda chosen on validation; shrunk to zero, as states of two layers are not near-copies."""
        cell = (source, target, group)
        path = ridge_path(self._fit[cell], self.lambdas, shrink="zero")
        return path.map(int(path_sse(path, self._validation[cell]).argmin()))

    def records(self) -> Iterable[Record]:
        """Return R², R² of the difference, CKA and cosine of every map and control on the test split."""
        return report(self)
