"""SteeringSubspace: few directions per site that carry what tuning changed, in closed form.

1. The training rows of target and neutral prompts are kept. When the validation split has been read, every
   solver's subspace and a map from base to tuned are solved for (`mechdiff.modules.steering_fit`).
2. The test split says how much of the difference of the models the subspaces hold
   (`mechdiff.modules.steering_report`).
3. What they do inside a model is that of `mechdiff.modules.subspaces`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mechdiff.config import LAMBDA_GRID, SEED
from mechdiff.errors import CheckpointError, FitError
from mechdiff.interventions.sites import POSITIONS
from mechdiff.modules.steering_fit import Contrast, Rows, Subspace, energy, fit
from mechdiff.modules.steering_report import report
from mechdiff.modules.subspaces import Subspaces
from mechdiff.results import Record

Batch = Mapping[str, Any]


class SteeringSubspace(Subspaces):
    """Subspaces in closed form, one per site and solver; rows of all served positions are pooled.

    Args:
        sites: Sites of tuned, such as ``resid_post.12``.
        source_sites: Site of base for each of them; the same sites by default.
        positions: Groups of positions whose rows are used.
        d_source: Width of base, read from its store.
        d_target: Width of tuned, read from its store; the same.
        noise: Share of the variance below which a difference is rounding of the stored states.
        solver: The estimator of the handle.
        compare: Estimators that are reported beside it.
        contrast: Whose means are subtracted: tuned's of target and neutral prompts (``classes``), or tuned's
            and base's of target prompts (``models``).
        k: Rank, for solvers of more than one direction.
        shrinkage: Of the scatter within the sets, for ``whitened``.
        lambdas: Ridge strengths of the map to choose from.
        seed: Seed of random subspaces and resampling.

    Raises:
        FitError: If a setting is out of range or the widths differ.
    """

    def __init__(
        self,
        sites: Sequence[str] = (),
        source_sites: Sequence[str] | None = None,
        positions: Sequence[str] = ("last",),
        d_source: int = 1,
        d_target: int = 1,
        noise: float = 0.0,
        solver: Subspace = "paired_svd",
        compare: Sequence[Subspace] = ("diff_mean", "diff_mean_svd", "whitened"),
        contrast: Contrast = "classes",
        k: int = 8,
        shrinkage: float = 0.1,
        lambdas: Sequence[float] = LAMBDA_GRID,
        seed: int = SEED,
    ) -> None:
        super().__init__(
            sites,
            source_sites,
            positions,
            d_source,
            d_target,
            noise,
            solver,
            compare,
            contrast,
            k,
            shrinkage,
            lambdas,
            seed,
        )
        self.save_hyperparameters()
        self.automatic_optimization = False
        self._rows: dict[str, list[Batch]] = {"train": [], "val": [], "test": []}

    # --- fitting -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse several processes, each of which would see a part of the rows.

        Raises:
            FitError: If there is more than one.
        """
        self.alone("for a subspace", " (extract ahead with `mechdiff extract`)")

    def configure_optimizers(self) -> Any:
        """Have no optimizer: the subspaces are solved for."""

    def on_train_epoch_start(self) -> None:
        """Forget the rows of an earlier epoch, which were the same."""
        self._rows["train"].clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """Keep the rows of a batch."""
        self.keep("train", batch)

    def on_validation_epoch_start(self) -> None:
        """Forget an earlier pass over the validation split."""
        self._rows["val"].clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the rows of a batch."""
        self.keep("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Solve for the subspaces and log the share of held-out differences that they miss.

        Raises:
            FitError: If a split has too few rows of a class.
        """
        if not self.trainer.sanity_checking:
            self.solve()
            self.log_energy()

    def on_fit_end(self) -> None:
        """Let go of the rows."""
        self._rows["train"].clear()
        self._rows["val"].clear()

    def keep(self, split: str, batch: Batch) -> None:
        """Keep the rows of a batch that are at ``positions``."""
        wanted = torch.tensor(
            [POSITIONS.index(name) for name in self.positions], device=batch["group"].device
        )
        rows = torch.isin(batch["group"], wanted)
        sides = {
            side: {name: batch[side][name][rows] for name in names}
            for side, names in (("source", self.sources), ("target", self.sites))
        }
        self._rows[split].append({**sides, "prompt": batch["prompt"][rows], "label": batch["label"][rows]})

    def rows(self, split: str, site: int) -> Rows:
        """Return the kept rows of one site.

        Args:
            split: ``train``, ``val`` or ``test``.
            site: Index of the site.

        Raises:
            FitError: If a class has none.
        """
        parts = self._rows[split]
        target = torch.cat([b["label"] == 1 for b in parts]) if parts else torch.zeros(0, dtype=torch.bool)
        for found, name in ((target, "target"), (~target, "neutral")):
            if not found.any():
                where = f"split {split} has no {name} rows at {self.where}"
                raise FitError(f"{where}; allowed: 1 or more (keys: model.positions, data.positions)")
        base = torch.cat([b["source"][self.sources[site]] for b in parts])
        tuned = torch.cat([b["target"][self.sites[site]] for b in parts])
        return Rows(base, tuned, target, torch.cat([b["prompt"] for b in parts]))

    def solve(self) -> None:
        """Fill the buffers from the kept rows."""
        for site in range(len(self.sites)):
            rows = self.rows("train", site)
            self.fill(site, fit(rows, self.rows("val", site), self.recipe))
            self.energy[site] = energy(self.basis(self.sites[site], self.recipe.solvers[0]), rows.change).to(
                self.energy
            )
            for place, chosen in enumerate((rows.target, ~rows.target)):
                self.fit_prompts[place] = len(rows.prompt[chosen].unique())

    def log_energy(self) -> None:
        """Log, by site and on average, how little of the held-out differences lies outside."""
        shares = []
        for site, name in enumerate(self.sites):
            shares.append(energy(self.basis(name), self.rows("val", site).change)[-1])
            self.log(f"val/{name}/energy", shares[-1])
        self.log("val/loss", 1 - torch.stack(shares).mean(), prog_bar=True)

    # --- testing -------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Refuse to test what was never fitted.

        Raises:
            CheckpointError: If nothing was.
        """
        if not self.fitted:
            raise CheckpointError(
                "this subspace has not been fitted; pass --ckpt_path with a checkpoint of a fit"
            )
        self._rows["test"].clear()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the rows: the test split is small, and its intervals are drawn by prompt."""
        self.keep("test", batch)

    def case(self, site: int) -> Rows:
        """Return the test rows of one site, on the CPU."""
        assert self._rows["test"], "records are there after a test"
        return Rows(*(part.cpu() for part in self.rows("test", site)))

    def records(self) -> Iterator[Record]:
        """Return held-out shares of the difference by rank, and angles between solvers."""
        return report(self)
