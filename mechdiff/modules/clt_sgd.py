"""CLTMapSGD: the same maps as CLTMap, by gradient descent; for more rows than a closed form wants to hold, or for several devices.

1. States are standardised with the mean and deviation of the training split.
2. AdamW descends the squared error of what is added to the shrinkage target, in units of its own variance.
3. After every epoch the parameters are folded back into plain affine maps, so that everything downstream is that of ``CLTMap``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mechdiff.config import SEED
from mechdiff.errors import FitError
from mechdiff.functional.clt import Shrink
from mechdiff.functional.stats import generator
from mechdiff.interventions.sites import POSITIONS
from mechdiff.modules.clt import Batch, CLTMap


class CLTMapSGD(CLTMap):
    """Maps fitted by AdamW, with early stopping on ``val/loss``.

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
    """

    mean_x: Tensor
    mean_y: Tensor
    scale_x: Tensor
    scale_y: Tensor

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
        super().__init__(sites, source_sites, positions, d_source, d_target, noise, shrink=shrink, seed=seed)
        self.save_hyperparameters()
        self.automatic_optimization = True
        self.solver_name = "sgd"
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        shape = (2, *self.mapped_weight.shape)  # the map, and its shuffled control
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(shape)),
            nn.Parameter(torch.zeros(2, *self.mapped_bias.shape)),
        )
        for name, width in (
            ("mean_x", d_source),
            ("scale_x", d_source),
            ("mean_y", d_target),
            ("scale_y", d_target),
        ):
            self.register_buffer(name, torch.zeros(*self.chosen.shape, width))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(
            [self.weight, self.bias], lr=self.learning_rate, weight_decay=self.weight_decay
        )

    def on_fit_start(self) -> None:
        """Read the training split once for means and deviations; a resumed fit has them from its checkpoint."""
        if bool((self.scale_x > 0).all()):
            return
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        sums: dict[tuple[int, int], list[Tensor]] = {}
        for batch in datamodule.train_dataloader():
            for (site, _, group), x, y in self._cells(batch):
                y = y - x if self.shrink == "identity" else y
                parts = [
                    torch.tensor(float(len(x))),
                    *(f(v.double()) for v in (x, y) for f in (_total, _squares)),
                ]
                sums[site, group] = [
                    a + b
                    for a, b in zip(sums.get((site, group), [torch.tensor(0.0)] * 5), parts, strict=True)
                ]
        for site in range(len(self.sites)):
            for group, positions in enumerate(self.positions):
                if (site, group) not in sums:
                    raise FitError(
                        f"no training rows at {self.sites[site]}, positions {positions} (keys: data.tokens, data.val_frac)"
                    )
                n, x1, x2, y1, y2 = sums[site, group]
                for name, first, second in (("x", x1, x2), ("y", y1, y2)):
                    mean = first / n
                    scale = (second / n - mean.square()).clamp_min(0).sqrt()
                    getattr(self, f"mean_{name}")[site, group] = mean.to(self.shift)
                    getattr(self, f"scale_{name}")[site, group] = scale.clamp_min(
                        1e-6 * scale.max() + 1e-12
                    ).to(self.shift)
                self.shift[site, group] = self.mean_y[site, group]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the squared error of map and shuffled control, averaged over sites and groups."""
        losses = []
        for (site, _, group), x, y in self._cells(batch):
            y = y - x if self.shrink == "identity" else y
            order = torch.randperm(
                len(x), generator=generator(self.seed, "shuffled", self.current_epoch, site, group, batch_idx)
            )
            source = (x - self.mean_x[site, group]) / self.scale_x[site, group]
            unit = self.scale_y[site, group].square().mean().sqrt()
            for control, target in enumerate((y, y[order.to(y.device)])):
                goal = (target - self.mean_y[site, group]) / unit
                losses.append(
                    (source @ self.weight[control, site, group] + self.bias[control, site, group] - goal)
                    .square()
                    .mean()
                )
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def _solve(self, site: int, group: int) -> None:
        """Fold the parameters into plain maps."""
        if (site, site, group) not in self._validation:
            raise FitError(
                f"no validation rows at {self.sites[site]}, positions {self.positions[group]} (key: data.val_frac)"
            )
        unit = self.scale_y[site, group].square().mean().sqrt()
        for control, kind in enumerate(("mapped", "shuffled")):
            weight = self.weight[control, site, group] / self.scale_x[site, group][:, None] * unit
            bias = (
                self.mean_y[site, group]
                + unit * self.bias[control, site, group]
                - self.mean_x[site, group] @ weight
            )
            if self.shrink == "identity":
                weight = weight + torch.eye(len(weight), device=weight.device)
            getattr(self, f"{kind}_weight")[site, group] = weight
            getattr(self, f"{kind}_bias")[site, group] = bias
        self.chosen[site, group] = 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of a closed form, which has no parameters to go on from."""
        if "weight" not in checkpoint["state_dict"]:
            raise FitError(
                "the checkpoint holds maps in closed form; resume a fit of CLTMapSGD (key: ckpt_path)"
            )


def _total(values: Tensor) -> Tensor:
    return values.sum(0)


def _squares(values: Tensor) -> Tensor:
    return values.square().sum(0)
