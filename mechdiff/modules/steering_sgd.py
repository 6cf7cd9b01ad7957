"""SteeringSubspaceSGD: subspaces by gradient descent, from stored states or through the frozen model.

1. Everything is first solved for in closed form; descent starts at the uncentred SVD.
2. Rows stay orthonormal by construction: they are a product of Householder reflections.
3. `contrast`: the share of tuned − base on target prompts outside the subspace, plus a penalty on what lies
   inside on neutral prompts, in the same unit. `causal`: whatever a scorer, set from outside, says of the
   basis inside the frozen model. The module never holds that model.
4. Several processes take the step that one would take with all of their rows; `causal` runs in one.
5. After every epoch the basis is copied to a buffer, so that everything downstream is that of `Subspaces`.

Source: Geiger et al. 2023 (arXiv:2303.02536), section 3 (a trained orthonormal basis).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from mechdiff.config import LAMBDA_GRID, SEED
from mechdiff.errors import FitError
from mechdiff.functional.steering import orthonormal
from mechdiff.modules.base import over_processes, shares
from mechdiff.modules.steering import SteeringSubspace
from mechdiff.modules.steering_fit import Contrast, Subspace

Loss = Literal["contrast", "causal"]
Scorer = Callable[[str, Tensor, Mapping[str, Any]], Tensor]
"""Takes a site, a basis `(k, d)` and a batch, and returns a scalar to be made small."""


class SteeringSubspaceSGD(SteeringSubspace):
    """Subspaces fitted by Adam; stop early, and keep the best, on ``val/loss``.

    Args:
        sites: Sites of tuned.
        source_sites: Site of base for each of them; the same sites by default.
        positions: Groups of positions whose rows are used.
        d_source: Width of base, read from its store.
        d_target: Width of tuned, read from its store; the same.
        noise: Share of the variance below which a difference is rounding of the stored states.
        compare: Closed forms that are reported beside it, the start of the descent among them.
        contrast: Whose means are subtracted, ``classes`` or ``models``.
        k: Rank.
        shrinkage: Of the scatter within the sets, for ``whitened``.
        lambdas: Ridge strengths of the map to choose from.
        loss: ``contrast`` or ``causal``.
        penalty: Weight of what lies inside on neutral prompts.
        learning_rate: Step of Adam.
        seed: Seed of random subspaces and resampling.

    Raises:
        FitError: If a setting is out of range or the widths differ.
    """

    basis_sgd: Tensor
    basis_paired_svd: Tensor
    unit: Tensor

    def __init__(
        self,
        sites: Sequence[str] = (),
        source_sites: Sequence[str] | None = None,
        positions: Sequence[str] = ("last",),
        d_source: int = 1,
        d_target: int = 1,
        noise: float = 0.0,
        compare: Sequence[Subspace] = ("diff_mean", "diff_mean_svd", "whitened"),
        contrast: Contrast = "classes",
        k: int = 8,
        shrinkage: float = 0.1,
        lambdas: Sequence[float] = LAMBDA_GRID,
        loss: Loss = "contrast",
        penalty: float = 1.0,
        learning_rate: float = 1e-3,
        seed: int = SEED,
    ) -> None:
        super().__init__(
            sites,
            source_sites,
            positions,
            d_source,
            d_target,
            noise,
            "paired_svd",
            compare,
            contrast,
            k,
            shrinkage,
            lambdas,
            seed,
        )
        self.save_hyperparameters()
        self.automatic_optimization = True
        if loss not in get_args(Loss):
            raise FitError(f"model.loss is {loss!r}; allowed: {', '.join(get_args(Loss))}")
        if not penalty >= 0 or not learning_rate >= 0:
            got = f"model.penalty is {penalty} and model.learning_rate {learning_rate}"
            raise FitError(f"{got}; allowed: 0 or more")
        self.loss, self.penalty, self.learning_rate = loss, penalty, learning_rate
        self.solver_name = "sgd"
        self.solvers = ["sgd", *self.solvers]
        self.register_buffer("basis_sgd", torch.zeros_like(self.basis_paired_svd))
        self.register_buffer("unit", torch.zeros(len(self.sites)))  # mean square of a target row's change
        self.trained = nn.ModuleList(_Rotating(k, d_target) for _ in self.sites)
        self._scorer: Scorer | None = None
        self._sums: list[Tensor] = []

    def attach_scorer(self, scorer: Scorer) -> None:
        """Set what the loss ``causal`` asks.

        Args:
            scorer: A plain function of site, basis and batch; a module would end up in checkpoints.
        """
        assert not isinstance(scorer, nn.Module), "a language model is never a child of a module"
        self._scorer = scorer

    def setup(self, stage: str) -> None:
        """Refuse several processes in a test or with the causal loss: each would see a part of the rows.

        Raises:
            FitError: If there is more than one.
        """
        if stage != "fit":
            super().setup(stage)
        elif self.loss == "causal":
            self.alone("with model.loss causal")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam; without decay, which would shrink the signs that the reflections are kept with."""
        return torch.optim.Adam(self.trained.parameters(), lr=self.learning_rate)

    def on_fit_start(self) -> None:
        """Solve in closed form and start there; a resumed fit has it from its checkpoint.

        Every process reads all rows, so that all start alike.

        Raises:
            FitError: If a split has too few rows of a class, or the loss ``causal`` has no scorer.
        """
        if self.loss == "causal" and self._scorer is None:
            raise FitError(
                "model.loss is causal without a scorer; allowed: with a callback that attaches one"
            )
        if self.fitted:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for split in ("train", "val"):
            self._rows[split].clear()
            for rows in data.rows(split).split(data.batch_size):
                self.keep(split, data.read(rows))
        self.solve()
        with torch.no_grad():
            for site, part in enumerate(self.trained):
                assert isinstance(part, _Rotating)
                part.start(self.basis_paired_svd[site])
                self.unit[site] = self.rows("train", site).change.square().sum(-1).mean()
        for split in ("train", "val"):
            self._rows[split].clear()
        self._copy()

    def on_train_epoch_start(self) -> None:
        """Keep no rows: they come batch by batch."""

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss, averaged over sites.

        Raises:
            FitError: If it is not finite.
        """
        target = batch["label"] == 1
        counts = torch.stack([target.sum(), (~target).sum()])
        loss = self.score(batch, shares(counts.to(self.unit.dtype))[0])
        if not loss.isfinite():
            raise FitError(
                f"the loss is {loss.item()} at step {self.global_step}; the checkpoints written so far are "
                "kept (keys: model.learning_rate, model.penalty)"
            )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget an earlier pass over the validation split."""
        self._sums.clear()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add up the loss, the rows, and by site the squares of the change inside the subspace and in all."""
        rows = len(batch["label"])
        sums = [self.score(batch).detach() * rows, self.unit.new_tensor(rows)]
        for site in range(len(self.sites)):
            change = self._change(site, batch)[batch["label"] == 1].to(torch.float64)
            basis = orthonormal(self.turned(site).detach()).to(change)
            sums += [(change @ basis.mT).square().sum(), change.square().sum()]
        self._sums.append(torch.stack([part.to(torch.float64) for part in sums]))

    def on_validation_epoch_end(self) -> None:
        """Copy the bases to their buffer and log the loss and what they hold."""
        if self.trainer.sanity_checking:
            return
        self._copy()
        none = self.unit.new_zeros(2 + 2 * len(self.sites), dtype=torch.float64)
        loss, rows, *squares = over_processes(sum(self._sums, none))
        self.log("val/loss", loss / rows, prog_bar=True, sync_dist=True)
        for name, inside, whole in zip(self.sites, squares[::2], squares[1::2], strict=True):
            share = inside / whole if whole > 0 else inside
            self.log(f"val/{name}/energy", share, sync_dist=True)

    def score(self, batch: Mapping[str, Any], share: Sequence[float] | Tensor = (1.0, 1.0)) -> Tensor:
        """Return the loss of a batch, averaged over sites.

        Args:
            batch: Rows of target and neutral prompts.
            share: What the means over target and over neutral rows count for; see `shares`.
        """
        losses = []
        for site, name in enumerate(self.sites):
            basis = self.turned(site)
            if self.loss == "causal":
                assert self._scorer is not None
                losses.append(self._scorer(name, basis, batch))
            else:
                losses.append(self._contrast(site, basis, batch, share))
        return torch.stack(losses).mean()

    def _change(self, site: int, batch: Mapping[str, Any]) -> Tensor:
        """Tuned − base, `(rows, d)`."""
        change: Tensor = batch["target"][self.sites[site]] - batch["source"][self.sources[site]]
        return change

    def _contrast(
        self, site: int, basis: Tensor, batch: Mapping[str, Any], share: Sequence[float] | Tensor
    ) -> Tensor:
        """Squares outside on target rows plus those inside on neutral rows, per square of the target rows."""
        change = self._change(site, batch).to(basis)
        inside, whole = (change @ basis.mT).square().sum(-1), change.square().sum(-1)
        target = batch["label"] == 1
        missed = share[0] * (whole - inside)[target].sum() / target.sum().clamp_min(1)
        leaked = share[1] * inside[~target].sum() / (~target).sum().clamp_min(1)
        return (missed + self.penalty * leaked) / self.unit[site].clamp_min(torch.finfo(basis.dtype).tiny)

    def turned(self, site: int) -> Tensor:
        """Return the basis of a site as it stands, `(k, d)`, with gradients."""
        weight = self.trained[site].weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def _copy(self) -> None:
        for site in range(len(self.sites)):
            self.basis_sgd[site] = orthonormal(self.turned(site))


class _Rotating(nn.Module):
    """Orthonormal rows `(k, d)` that gradients can turn."""

    weight: Tensor

    def __init__(self, k: int, d: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # the decomposition behind it cannot be tried out without memory
            self.weight = nn.Parameter(torch.eye(k, d))
            # A trivialised parametrisation would complete the basis from the global generator.
            orthogonal(self, "weight", orthogonal_map="householder", use_trivialization=False)

    def start(self, basis: Tensor) -> None:
        """Take on a basis, in place: assigned to `weight`, it would take the gradients out of DDP."""
        kept: Any = self.get_submodule("parametrizations.weight")
        kept.original.copy_(kept[0].right_inverse(basis))
