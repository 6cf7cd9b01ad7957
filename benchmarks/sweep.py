"""A sweep over strengths and ranks of an edit, resumed above its site and by hooks with full forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.clock import timed
from mechdiff.interventions.hooks import intervene
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules import SteeringSubspace
from mechdiff.modules.base import UNTOUCHED
from mechdiff.pairs.loading import LoadedModel

ALPHAS, RANKS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (1, 2, 4, 8)


def handles(base: LoadedModel, layer: int) -> SteeringSubspace:
    """Make a module whose subspace is drawn: what an edit costs does not depend on where it points."""
    module = SteeringSubspace([str(Site(layer))], d_source=base.width, d_target=base.width, k=max(RANKS))
    draws = torch.Generator().manual_seed(3)
    rows = torch.linalg.qr(torch.randn(base.width, max(RANKS), generator=draws)).Q.T
    module.basis_paired_svd[0] = rows.to(module.basis_paired_svd)
    return module


class Sweep:
    """Both ways of one sweep.

    Args:
        engine: Of the model.
        module: Whose edits they are.
        ids: Prompts of one length, `(rows, T)`.
        layer: The block after which states are edited.
        positions: ``all``, or ``last``.
    """

    def __init__(
        self, engine: SuffixEngine, module: SteeringSubspace, ids: Tensor, layer: int, positions: str
    ) -> None:
        self.engine, self.module, self.ids, self.layer, self.positions = engine, module, ids, layer, positions
        self.cells = [(alpha, k) for alpha in ALPHAS for k in RANKS]
        self.bases = {k: module.basis(Site(layer))[:k] for k in RANKS}
        self.where = torch.zeros_like(ids) if positions == "all" else torch.full_like(ids, UNTOUCHED)
        self.where[:, -1] = 0

    def edit(self, alpha: float, k: int) -> Any:
        """Return one cell as edits."""
        about = {"site": Site(self.layer), "kind": "amplify", "basis": self.bases[k], "alpha": alpha}
        return self.module.edits(None, self.where, **about)

    @torch.no_grad()
    def by_hooks(self) -> Tensor:
        """Run the whole model with a hook for each cell; return logits `(cells, rows, vocabulary)`."""
        found = []
        for cell in self.cells:
            with intervene(self.engine.model, self.edit(*cell)):
                logits = self.engine.model(input_ids=self.ids, use_cache=False).logits
            found.append(logits[:, -1].clone())
        return torch.stack(found)

    @torch.no_grad()
    def prepare(self) -> tuple[Tensor, list[DynamicCache]]:
        """Run the model as it is, once; return states, and what is kept of each prompt but its last token."""
        states = self.engine.clean(self.ids, None, [self.layer]).states[self.layer]
        if self.positions == "all":
            return states, []
        return states[:, -1], [self.engine.prefill(row[None, :-1]) for row in self.ids]

    @torch.no_grad()
    def resumed(self, states: Tensor, prefixes: list[DynamicCache]) -> Tensor:
        """Run what lies above the site for each cell, and return the same logits."""
        layer = self.layer
        if self.positions == "all":
            found = [
                self.engine.resume(layer, states, self.ids, edits=self.edit(*cell)) for cell in self.cells
            ]
            return torch.stack(found)
        found = []
        for row, prefix in enumerate(prefixes):
            hidden = torch.stack(
                [
                    self.module.change(Site(layer), "amplify", states[row], basis=self.bases[k], alpha=a)
                    for a, k in self.cells
                ]
            )
            tokens = self.ids[row, -1:].expand(len(self.cells), 1)
            found.append(self.engine.resume(layer, hidden[:, None], tokens, prefix=prefix))
        return torch.stack(found, 1)


def sweep(
    engine: SuffixEngine,
    module: SteeringSubspace,
    ids: Tensor,
    layer: int,
    positions: str,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time both ways of one sweep, and compare their logits."""
    both = Sweep(engine, module, ids, layer, positions)
    ready = timed(both.prepare, device, 3)
    states, prefixes = both.prepare()
    wanted, found = both.by_hooks().float(), both.resumed(states, prefixes).float()
    error = float((found - wanted).norm() / wanted.norm())
    fast, slow = (
        timed(call, device, 3, 0) for call in (lambda: both.resumed(states, prefixes), both.by_hooks)
    )
    figures = {
        "hooks_seconds": slow.seconds,
        "resumed_seconds": fast.seconds,
        "clean_run_seconds": ready.seconds,
        "hooks_peak_gib": slow.peak_gib,
        "resumed_peak_gib": fast.peak_gib,
        "relative_difference_of_logits": error,
        "prompts": len(ids),
        "tokens_each": ids.shape[1],
    }
    goal = 4.0 if positions == "all" else 35.0
    ratios = {
        "speedup_from_cached_states": {"value": slow.seconds / fast.seconds, "goal": goal},
        "speedup_with_the_clean_run": {"value": slow.seconds / (fast.seconds + ready.seconds), "goal": None},
    }
    return figures, ratios
