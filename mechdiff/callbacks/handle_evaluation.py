"""What evaluations of a handle share: the two sides of a pair, and the handle that the run has chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from mechdiff.callbacks.base import CausalEvaluation
from mechdiff.callbacks.patcher import Side, groups
from mechdiff.data.activations import ActivationPairs
from mechdiff.data.prompts import Prompt
from mechdiff.errors import ConfigError
from mechdiff.interventions.hooks import Edit
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.alignment import align, common_template, encode, template_tokens
from mechdiff.pairs.loading import LoadedPair
from mechdiff.results import Record

if TYPE_CHECKING:
    from mechdiff.modules.subspaces import Subspaces

CHOSEN = "chosen_handle"
"""Quantity of the record that says which handle a run has chosen."""
ENOUGH = 100
"""Random subspaces that it takes to call an effect one."""
LAST, ANSWER = "last", "last+answer"
"""Tokens that an edit changes: the last of the prompt, or also every token of the answer."""


@dataclass(frozen=True)
class Handle:
    """One edit at one site.

    Attributes:
        site: Where it acts.
        kind: What is done; see `change` of the module.
        k: Number of directions.
        alpha: Strength.
        solver: Who found the directions; None is the module's own.
    """

    site: Site
    kind: str
    k: int
    alpha: float
    solver: str | None = None

    @property
    def params(self) -> dict[str, Any]:
        """What records say of it."""
        return {"edit": self.kind, "k": self.k, "alpha": self.alpha, "solver": self.solver}

    def change(self, module: DiffModule, states: Tensor, donor: Tensor | None = None) -> Tensor:
        """Edit states of base, `(..., d)`.

        Args:
            module: The fitted subspaces.
            states: What is edited.
            donor: Tuned's states, of the same shape, for `interchange`.
        """
        basis = self.basis(module).to(states.device)
        return subspaces(module).change(self.site, self.kind, states, donor, basis=basis, alpha=self.alpha)

    def basis(self, module: DiffModule) -> Tensor:
        """Return its directions, orthonormal rows `(k, d)`."""
        return subspaces(module).basis(self.site, self.solver, self.k)

    def edits(self, module: DiffModule, where: Tensor) -> Mapping[Site, Edit]:
        """Return the edit of a running batch, for kinds that need no second model.

        Args:
            module: The fitted subspaces.
            where: Where it acts, `(batch, position)`.
        """
        cell = {"site": self.site, "kind": self.kind, "k": self.k, "alpha": self.alpha}
        return module.edits(None, where, **cell, solver=self.solver)


class HandleEvaluation(CausalEvaluation):
    """An evaluation that goes on from a handle.

    Attributes:
        data: The activations that the module was fitted to.
        earlier: What the evaluations before this one have recorded.
        fast: Whether this is a trial of the plumbing.
        contrast: Whose means the module's difference in means is of.
        unchosen: Why the run has chosen no handle of the kind in use; None where it has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.data: ActivationPairs | None = None
        self.earlier: list[Record] = []
        self.fast = False
        self.contrast: str | None = None
        self.unchosen: str | None = None

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what the run has so far, then run the evaluation."""
        data = getattr(trainer, "datamodule", None)
        self.data = data if isinstance(data, ActivationPairs) else None
        before = [c for c in trainer.callbacks if isinstance(c, CausalEvaluation)]  # type: ignore[attr-defined]
        self.earlier = [r for c in before[: before.index(self)] for r in c.results]
        self.fast = bool(getattr(trainer, "fast_dev_run", False))
        super().on_test_end(trainer, pl_module)

    def handle(self, module: DiffModule, kind: str, k: int | None, alpha: float | None) -> Handle:
        """Return the handle to go on from.

        What is not given comes from the run's choice, if there is one of this kind; else k is 4, or less if
        the module holds fewer directions, alpha 1 and the site the module's last, and `unchosen` says why.

        Args:
            module: The fitted subspaces.
            kind: What is done.
            k: Number of directions.
            alpha: Strength.

        Raises:
            ConfigError: If k is out of range.
        """
        most = len(subspaces(module).basis(module.sites[-1]))
        given = Handle(residuals(module)[-1], kind, min(4, most) if k is None else k, 1.0)
        given = given if alpha is None else replace(given, alpha=alpha)
        self.contrast, self.unchosen = subspaces(module).contrast, "no_steering"
        for r in self.earlier:
            if r.quantity != CHOSEN or r.params.get("edit") != kind:
                continue
            self.unchosen = r.reason
            if r.value is not None and r.site:
                given = Handle(
                    Site.parse(r.site),
                    kind,
                    int(r.value) if k is None else k,
                    float(r.params["alpha"]) if alpha is None else alpha,
                    r.params.get("solver"),
                )
                break
        if not 1 <= given.k <= most:
            raise ConfigError(f"k is {given.k}; allowed: 1 to {most}, the rank of the handle (key: k)")
        return given if given.solver else replace(given, solver=module.solver_name)

    def about(self, handle: Handle, acts_on: str, **more: Any) -> dict[str, Any]:
        """Return params and flags of records of a handle; that no run chose it is said in both.

        Args:
            handle: The handle.
            acts_on: Tokens that it changes.
            **more: What else goes into `params`.
        """
        params = {**handle.params, "acts_on": acts_on, "contrast": self.contrast, **more}
        if self.unchosen is None:
            return {"params": params}
        return {"params": {**params, "not_chosen": self.unchosen}, "flags": ("not_chosen",)}


def residuals(module: DiffModule) -> list[Site]:
    """Return the residual sites of a module, by layer.

    Raises:
        ConfigError: If it has none.
    """
    sites = sorted(site for site in map(Site.parse, module.sites) if site.component == "resid_post")
    if not sites:
        raise ConfigError(
            f"sites are {', '.join(module.sites)}; allowed: some resid_post.<layer> (key: layers)"
        )
    return sites


def two_engines(pair: LoadedPair) -> tuple[SuffixEngine, SuffixEngine]:
    """Return the engines of base and tuned, which are checked as they are made: make them once."""
    return SuffixEngine(pair.base.model), SuffixEngine(pair.tuned.model)


def two_sides(
    pair: LoadedPair, prompts: Sequence[Prompt], engines: tuple[SuffixEngine, SuffixEngine]
) -> tuple[Side, Side]:
    """Return base and tuned with the same prompts, not yet read.

    Args:
        pair: The models.
        prompts: What both are given.
        engines: Those of the two models.
    """
    base, tuned = (
        Side(m, engine, ids.to(m.device), [encode(m.tokenizer, p.text) for p in prompts])
        for m, engine, ids in (
            (pair.base, engines[0], pair.shared.base_ids),
            (pair.tuned, engines[1], pair.shared.tuned_ids),
        )
    )
    return base, tuned


def same_end(base: Side, tuned: Side) -> list[bool]:
    """Tell of each prompt whether its last token is the same place for both models."""
    (prefix_a, suffix_a), (prefix_b, suffix_b) = (template_tokens(s.loaded.tokenizer) for s in (base, tuned))
    common = common_template(prefix_a, prefix_b, suffix_a, suffix_b)
    last = POSITIONS.index("last")
    return [
        int(groups(align(a, b, *common), a, b)[-1]) == last
        for a, b in zip(base.encoded, tuned.encoded, strict=True)
    ]


def subspaces(module: DiffModule) -> Subspaces:
    """Return the module as what it must be."""
    if not hasattr(module, "change"):
        name = type(module).__name__
        raise ConfigError(f"{name} holds no handle; allowed: SteeringSubspace (key: model.class_path)")
    return module  # type: ignore[return-value]
