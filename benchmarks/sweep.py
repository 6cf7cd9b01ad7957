"""A sweep over strengths and ranks of an edit, resumed above its site and by hooks with full forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


@torch.no_grad()
def sweep(
    engine: SuffixEngine,
    module: SteeringSubspace,
    ids: Tensor,
    layer: int,
    positions: str,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time both ways of one sweep, and compare their logits."""
    site, rows = Site(layer), len(ids)
    cells = [(alpha, k) for alpha in ALPHAS for k in RANKS]
    bases = {k: module.basis(site)[:k] for k in RANKS}
    where = torch.zeros_like(ids) if positions == "all" else torch.full_like(ids, UNTOUCHED)
    where[:, -1] = 0

    def edit(alpha: float, k: int) -> Any:
        return module.edits(None, where, site=site, kind="amplify", basis=bases[k], alpha=alpha)

    def by_hooks() -> Tensor:
        found = []
        for cell in cells:
            with intervene(engine.model, edit(*cell)):
                logits = engine.model(input_ids=ids, use_cache=False).logits
            found.append(logits[:, -1].clone())
        return torch.stack(found)

    def prepare() -> Any:
        states = engine.clean(ids, None, [layer]).states[layer]
        if positions == "all":
            return states, None
        return states[:, -1], [engine.prefill(row[None, :-1]) for row in ids]

    def resumed(states: Tensor, prefixes: Any) -> Tensor:
        if positions == "all":
            return torch.stack([engine.resume(layer, states, ids, edits=edit(*cell)) for cell in cells])
        found = []
        for row in range(rows):
            hidden = torch.stack(
                [module.change(site, "amplify", states[row], basis=bases[k], alpha=a) for a, k in cells]
            )
            tokens = ids[row, -1:].expand(len(cells), 1)
            found.append(engine.resume(layer, hidden[:, None], tokens, prefix=prefixes[row]))
        return torch.stack(found, 1)

    ready = timed(prepare, device, 3)
    states, prefixes = prepare()
    wanted, found = by_hooks().float(), resumed(states, prefixes).float()
    error = float((found - wanted).norm() / wanted.norm())
    fast, slow = (timed(call, device, 3, 0) for call in (lambda: resumed(states, prefixes), by_hooks))
    figures = {
        "hooks_seconds": slow.seconds,
        "resumed_seconds": fast.seconds,
        "clean_run_seconds": ready.seconds,
        "hooks_peak_gib": slow.peak_gib,
        "resumed_peak_gib": fast.peak_gib,
        "relative_difference_of_logits": error,
        "prompts": rows,
        "tokens_each": ids.shape[1],
    }
    goal = 4.0 if positions == "all" else 35.0
    ratios = {
        "speedup_from_cached_states": {"value": slow.seconds / fast.seconds, "goal": goal},
        "speedup_with_the_clean_run": {"value": slow.seconds / (fast.seconds + ready.seconds), "goal": None},
    }
    return figures, ratios
