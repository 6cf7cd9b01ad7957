"""CLTMapSGD: the maps of CLTMap by gradient descent, for more rows than one process wants to sum up.

1. States are standardised with the mean and deviation of the training split.
2. AdamW descends the squared error of what is added to the shrinkage target, in units of its own deviation.
   The control descends beside it, on shuffled rows.
3. Several processes take the step that one would take with all of their rows.
4. After every epoch the parameters are folded back into plain affine maps, so that everything downstream is
   that of `AffineMaps`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mechdiff.config import SEED
from mechdiff.functional.clt import AffineMap, Shrink
from mechdiff.functional.moments import Moments
from mechdiff.functional.stats import generator
from mechdiff.interventions.sites import POSITIONS
from mechdiff.modules.base import shares
from mechdiff.modules.clt_fit import other_rows
from mechdiff.modules.maps import AffineMaps, Batch


class CLTMapSGD(AffineMaps):
    """Maps fitted by AdamW; stop early, and keep the best, on ``val/loss``.

    Args:
        sites: Target sites.
        source_sites: Source site of each target site; the same sites by default.
        positions: Groups of positions that get maps of their own.
        d_source: Width of the source, read from its store.
        d_target: Width of the target, read from its store.
        noise: Share of the target's variance below which a difference is rounding.
        shrink: Where the map starts and what weight decay pulls it to: ``identity`` or ``zero``.
        learning_rate: Step of AdamW.
        weight_decay: Decay of AdamW.
        seed: Seed of shuffling and resampling.

    Raises:
        FitError: If the sites, positions or widths do not allow maps.
    """

    mean_x: Tensor
    mean_y: Tensor
    scale_x: Tensor
    unit: Tensor

    def __init__(
        self,
        sites: Sequence[str] = (),
        source_sites: Sequence[str] | None = None,
        positions: Sequence[str] = POSITIONS,
        d_source: int = 1,
        d_target: int = 1,
        noise: float = 0.0,
        shrink: Shrink = "identity",
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        seed: int = SEED,
    ) -> None:
        super().__init__(sites, source_sites, positions, d_source, d_target, noise, shrink, seed)
        self.save_hyperparameters()
        self.solver_name = "sgd"
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.weight = nn.Parameter(torch.zeros(2, *self.mapped_weight.shape))  # the map, then its control
        self.bias = nn.Parameter(torch.zeros(2, *self.mapped_bias.shape))
        for name, shape in (
            ("mean_x", (d_source,)),
            ("scale_x", (d_source,)),
            ("mean_y", (d_target,)),
            ("unit", ()),
        ):
            self.register_buffer(name, torch.zeros(*self.chosen.shape, *shape))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        parameters = [self.weight, self.bias]
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)

    def on_fit_start(self) -> None:
        """Read the training split once for means and deviations; a resumed fit has them from its checkpoint.

        Every process reads all of it, so that all standardise alike.

        Raises:
            FitError: If there are fewer than 2 rows at some position.
        """
        if self.unit.numel() and bool((self.unit > 0).all()):
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        sums: dict[tuple[int, int], tuple[int, Tensor]] = {}
        for rows in data.rows("train").split(data.batch_size):
            for (site, _, group), x, y in self.cells(data.read(rows)):
                both = torch.cat([x, y], 1).to(torch.float64)
                both[:, self.d_source :] -= both[:, : self.d_source] if self.shrink == "identity" else 0
                n, total = sums.get((site, group), (0, torch.zeros(())))
                sums[site, group] = n + len(x), total + torch.stack([both.sum(0), both.square().sum(0)])
        for site in range(len(self.sites)):
            for group in range(len(self.positions)):
                n, total = sums.get((site, group), (0, torch.zeros(())))
                if n < 2:
                    raise self.no_rows("training", site, group)
                self._standardise(site, group, *(total / n))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the squared error of maps and shuffled controls, averaged over sites and groups."""
        counts = [(batch["group"] == POSITIONS.index(name)).sum() for name in self.positions]
        share, rows = shares(torch.stack(counts).to(self.shift.dtype))
        losses = []
        for (site, _, group), x, y in self.cells(batch):
            target = y - x if self.shrink == "identity" else y
            draws = generator(self.seed, "shuffled", self.current_epoch, site, group, batch_idx)
            other = other_rows(len(x), draws).to(x.device)
            source = (x - self.mean_x[site, group]) / self.scale_x[site, group]
            goals = (torch.stack([target, target[other]]) - self.mean_y[site, group]) / self.unit[site, group]
            predicted = source @ self.weight[:, site, group] + self.bias[:, site, group, None]
            losses.append(share[group] * (predicted - goals).square().mean())
        loss = torch.stack(losses).sum() / (len(self.sites) * (rows > 0).sum())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def solve(self, site: int, group: int, validation: Moments) -> None:
        """Fold the parameters of one site and group into plain maps.

        Args:
            site: Index of the site.
            group: Index into ``positions``.
            validation: Not used: the epoch to keep is chosen by callbacks.
        """
        mean_x, mean_y, unit = (part[site, group] for part in (self.mean_x, self.mean_y, self.unit))
        for control, kind in enumerate(("mapped", "shuffled")):
            weight = unit * self.weight[control, site, group] / self.scale_x[site, group][:, None]
            bias = mean_y + unit * self.bias[control, site, group] - mean_x @ weight
            if self.shrink == "identity":
                weight = weight + torch.eye(len(weight), device=weight.device)
            self.keep(site, group, kind, AffineMap(weight, bias))
        self.chosen[site, group] = 0

    def _standardise(self, site: int, group: int, mean: Tensor, square: Tensor) -> None:
        """Keep means and deviations, none of them too small to divide by."""
        scale = (square - mean.square()).clamp_min(0).sqrt()
        x, y = mean.split([self.d_source, self.d_target])
        scale_x, scale_y = scale.split([self.d_source, self.d_target])
        tiny = torch.finfo(self.shift.dtype).tiny ** 0.5
        self.mean_x[site, group], self.mean_y[site, group] = x.to(self.shift), y.to(self.shift)
        self.scale_x[site, group] = scale_x.clamp_min(1e-6 * scale_x.max() + tiny).to(self.shift)
        self.unit[site, group] = scale_y.square().mean().sqrt().clamp_min(tiny).to(self.shift)
        if self.equal_widths:
            self.shift[site, group] = (y if self.shrink == "identity" else y - x).to(self.shift)
