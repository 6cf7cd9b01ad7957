"""AffineMaps: one affine map per site and group of positions, however it was fitted.

1. A batch of paired states is split into cells: a source site, a target site and a group of positions.
2. When the validation split has been read, a subclass solves for the maps; they are kept as buffers, so that
   a checkpoint holds them.
3. The test split is predicted by each map and by its controls: the identity, the mean shift, a map fitted to
   shuffled rows, another layer's map (`mechdiff.modules.clt_report`).
4. Inside a model, a map replaces the states of its site and positions by mapped ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechdiff.errors import CheckpointError, FitError
from mechdiff.functional.clt import AffineMap, Shrink, map_states
from mechdiff.functional.moments import Moments, check_equal_widths
from mechdiff.functional.r2 import map_sse
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.modules.base import UNTOUCHED, DiffModule, refuse_other_fit
from mechdiff.modules.clt_report import Case, report
from mechdiff.results import Record

if TYPE_CHECKING:
    from mechdiff.interventions.hooks import Edit

KINDS = ("raw", "mapped", "mean_shift", "shuffled", "wrong_layer", "self")
"""What an edit writes: the donor's state as it is, mapped, under a control's map, or the recipient's own."""

Batch = Mapping[str, Any]
Cell = tuple[int, int, int]  # source site, target site, group of positions


class AffineMaps(DiffModule):
    """Maps from the states of a source site to those of a target site.

    Args:
        sites: Target sites.
        source_sites: Source site of each target site; None takes the same sites.
        positions: Groups of positions that get maps of their own.
        d_source: Width of the source.
        d_target: Width of the target.
        noise: Share of the target's variance below which a difference is rounding of the stored states.
        shrink: What a map without evidence is: the ``identity`` (equal widths) or ``zero``, beside a shift.
        seed: Seed of shuffling and resampling.

    Raises:
        FitError: If the sites, positions or widths do not allow maps.
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
        sites: Sequence[str],
        source_sites: Sequence[str] | None,
        positions: Sequence[str],
        d_source: int,
        d_target: int,
        noise: float,
        shrink: Shrink,
        seed: int,
    ) -> None:
        super().__init__()
        self.sites, self.sources = list(sites), list(source_sites or sites)
        self.positions = [name for name in POSITIONS if name in positions]
        if set(positions) - set(POSITIONS) or not self.positions:
            raise FitError(f"model.positions is {list(positions)}; allowed: some of {', '.join(POSITIONS)}")
        if len(self.sources) != len(self.sites):
            counts = f"{len(self.sources)} entries for {len(self.sites)} sites"
            raise FitError(f"model.source_sites has {counts}; allowed: as many as sites")
        if shrink not in ("identity", "zero"):
            raise FitError(f"model.shrink is {shrink!r}; allowed: identity, zero")
        if shrink == "identity":
            check_equal_widths(d_source, d_target)
        self.d_source, self.d_target = d_source, d_target
        self.noise, self.shrink, self.seed = noise, shrink, seed
        cells = (len(self.sites), len(self.positions))
        for kind in ("mapped", "shuffled"):
            self.register_buffer(f"{kind}_weight", torch.zeros(*cells, d_source, d_target))
            self.register_buffer(f"{kind}_bias", torch.zeros(*cells, d_target))
        self.register_buffer("shift", torch.zeros(*cells, d_target))
        self.register_buffer("chosen", torch.full(cells, -1))
        self._validation: dict[Cell, Moments] = {}
        self._test: list[Batch] = []

    # --- what was fitted -----------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether maps have been fitted or loaded."""
        return self.chosen.numel() > 0 and bool((self.chosen >= 0).all())

    @property
    def equal_widths(self) -> bool:
        """Whether source and target can be subtracted."""
        return self.d_source == self.d_target

    def affine(self, site: int, group: int, kind: str = "mapped") -> AffineMap:
        """Return one map.

        Args:
            site: Index of the site.
            group: Index into ``positions``.
            kind: ``mapped``, ``shuffled``, ``mean_shift``, or ``wrong_layer``: the map of the next site.
        """
        if kind == "mean_shift":
            assert self.equal_widths, "a shift needs equal widths"
            return AffineMap(torch.eye(self.d_target).to(self.shift), self.shift[site, group])
        if kind == "wrong_layer":
            site, kind = (site + 1) % len(self.sites), "mapped"
        weight, bias = getattr(self, f"{kind}_weight"), getattr(self, f"{kind}_bias")
        return AffineMap(weight[site, group], bias[site, group])

    def keep(self, site: int, group: int, kind: str, affine: AffineMap) -> None:
        """Write a map, ``mapped`` or ``shuffled``, into the buffers."""
        getattr(self, f"{kind}_weight")[site, group] = affine.weight.to(self.shift)
        getattr(self, f"{kind}_bias")[site, group] = affine.bias.to(self.shift)

    def controls(self) -> list[str]:
        """Return the controls that these sites and widths allow."""
        return ["shuffled"] + ["mean_shift"] * self.equal_widths + ["wrong_layer"] * (len(self.sites) > 1)

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters that a checkpoint must share with the module it is loaded into."""
        return {
            "sites": self.sites,
            "source_sites": self.sources,
            "positions": self.positions,
            "shrink": self.shrink,
        }

    def params(self, site: int, group: int) -> dict[str, Any]:
        """Return what identifies the map of a site and group in its records."""
        return {"solver": self.solver_name, "lambda_": None, "k": None, "source_site": self.sources[site]}

    def flags(self, site: int, group: int) -> tuple[str, ...]:
        """Return warnings about the map of a site and group."""
        return ()

    def forward(self, source: Tensor, site: int = 0, group: int = 0) -> Tensor:
        """Map source states ``(..., d_source)`` of one site and group to ``(..., d_target)``."""
        return map_states(source, self.affine(site, group))

    def edits(self, donor: Mapping[Site, Tensor] | None, where: Tensor, **cell: Any) -> Mapping[Site, Edit]:
        """Return the replacement of one site's states by the donor's.

        Args:
            donor: ``{site: (batch, position, d)}`` in the recipient's rows: the target site itself for the
                kind ``raw``, its source site for a map.
            where: Index into ``POSITIONS``, ``(batch, position)``; ``UNTOUCHED`` keeps what is there.
            **cell: ``site``, a target site of this module, and ``kind``, one of ``KINDS``.
        """
        site, kind = cell["site"], cell["kind"]
        assert kind in KINDS, kind
        index = self.sites.index(str(site))
        if kind == "self":
            return {}
        assert donor is not None
        states = donor[site if kind == "raw" else Site.parse(self.sources[index])]

        def edit(activation: Tensor, _positions: Tensor) -> Tensor:
            edited = activation.clone()
            if kind == "raw":
                chosen = where != UNTOUCHED
                edited[chosen] = states[chosen].to(activation)
                return edited
            for group, name in enumerate(self.positions):
                chosen = where == POSITIONS.index(name)
                if chosen.any():
                    edited[chosen] = map_states(
                        states[chosen].to(activation), self.affine(index, group, kind)
                    )
            return edited

        return {site: edit}

    # --- fitting -------------------------------------------------------------------------------------------

    def pairs(self) -> list[tuple[int, int]]:
        """Return the source and target sites that are looked at together, by index."""
        return [(site, site) for site in range(len(self.sites))]

    def cells(self, batch: Batch) -> Iterator[tuple[Cell, Tensor, Tensor]]:
        """Yield the rows of a batch, ``(rows, d_source)`` and ``(rows, d_target)``, for each of its cells."""
        for group, positions in enumerate(self.positions):
            rows = batch["group"] == POSITIONS.index(positions)
            if not rows.any():
                continue
            x = [batch["source"][name][rows] for name in self.sources]
            y = [batch["target"][name][rows] for name in self.sites]
            yield from (((s, t, group), x[s], y[t]) for s, t in self.pairs())

    def on_validation_epoch_start(self) -> None:
        """Forget an earlier pass over the validation split."""
        self._validation.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        for cell, x, y in self.cells(batch):
            self.add(self._validation, cell, x, y)

    def on_validation_epoch_end(self) -> None:
        """Solve for the maps and log how well they predict.

        Raises:
            FitError: If a split has too few rows at some position.
        """
        if self.trainer.sanity_checking:
            return
        losses = []
        for site, name in enumerate(self.sites):
            for group, positions in enumerate(self.positions):
                moments = self.seen((site, site, group))
                if moments.n < 1:
                    raise self.no_rows("validation", site, group)
                self.solve(site, group, moments)
                spread, errors = moments.yy.sum(), map_sse(self.affine(site, group), moments).sum()
                if not spread > 0:
                    continue
                losses.append(errors / spread)
                self.log(f"val/{name}/{positions}/r2", 1 - losses[-1], sync_dist=True)
                gap = moments.gap().sum() if self.equal_widths else torch.zeros_like(spread)
                if gap > self.noise * spread:
                    self.log(f"val/{name}/{positions}/r2_delta", 1 - errors / gap, sync_dist=True)
        if losses:
            self.log("val/loss", torch.stack(losses).mean(), prog_bar=True, sync_dist=True)

    @abstractmethod
    def solve(self, site: int, group: int, validation: Moments) -> None:
        """Fill the buffers of one site and group.

        Args:
            site: Index of the site.
            group: Index into ``positions``.
            validation: Moments of the validation rows.
        """

    def add(self, kept: dict[Cell, Moments], cell: Cell, x: Tensor, y: Tensor) -> None:
        """Add rows to the moments of a cell."""
        if cell not in kept:
            kept[cell] = Moments.zeros(self.d_source, self.d_target, x.device)
        kept[cell].update(x, y)

    def seen(self, cell: Cell) -> Moments:
        """Return the moments of the validation rows that all processes have seen."""
        own = self._validation.get(cell) or Moments.zeros(self.d_source, self.d_target, self.shift.device)
        if self.trainer.world_size == 1:
            return own
        gathered = {name: self.all_gather(part) for name, part in own.tensors().items()}
        parts = [
            Moments(**{name: part[rank].clone() for name, part in gathered.items()})
            for rank in range(self.trainer.world_size)
        ]
        return reduce(_merged, parts)

    def no_rows(self, split: str, site: int, group: int) -> FitError:
        """Make the error that names a cell without rows."""
        where = f"{self.sites[site]}, positions {self.positions[group]}"
        return FitError(
            f"too few {split} rows at {where} (keys: model.positions, data.tokens, data.val_frac)"
        )

    # --- testing -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse a test by several processes, each of which would report on a part of the rows.

        Raises:
            FitError: If there is more than one.
        """
        if stage == "test":
            self.alone("for a test")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the maps of other sites, or maps that were fitted in another way.

        Raises:
            CheckpointError: If they are.
        """
        refuse_other_fit(self, checkpoint, "other maps: class, sites, positions or widths")

    def on_test_start(self) -> None:
        """Refuse to test what was never fitted.

        Raises:
            CheckpointError: If nothing was.
        """
        if not self.fitted:
            raise CheckpointError("this map has not been fitted; pass --ckpt_path with a checkpoint of a fit")
        self._test.clear()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the rows: the test split is small, and its intervals are drawn by prompt."""
        sides = {
            side: {name: rows.cpu() for name, rows in batch[side].items()} for side in ("source", "target")
        }
        self._test.append({**sides, "prompt": batch["prompt"].cpu(), "group": batch["group"].cpu()})

    def case(self, source: int, target: int, group: int) -> Case:
        """Return the test rows of one source site, target site and group, on the CPU."""
        assert self._test, "records are there after a test"
        parts = [(b, b["group"] == POSITIONS.index(self.positions[group])) for b in self._test]
        x = torch.cat([b["source"][self.sources[source]][rows] for b, rows in parts])
        y = torch.cat([b["target"][self.sites[target]][rows] for b, rows in parts])
        return Case(x, y, torch.cat([b["prompt"][rows] for b, rows in parts]))

    def records(self) -> Iterable[Record]:
        """Return R², R² of the difference, CKA and cosine of every map and control on the test split."""
        return report(self)


def _merged(a: Moments, b: Moments) -> Moments:
    a.merge(b)
    return a
