"""CausalLoss: teach a subspace by what exchanging it does inside the frozen model.

1. Before the fit both models read some training and validation prompts; base's keys and values, the states at
   the sites, and what both would say next are kept.
2. The loss of a batch, for the prompts of it that were read: base's state is moved to tuned's within the
   subspace at the last position, and the blocks above run. On targets it is KL(tuned ‖ edited base); on
   neutral prompts the penalty is KL(base ‖ edited base).
3. The module gets a plain function; it never holds a model.

Source: Geiger et al. 2023 (arXiv:2303.02536), section 3 (interchange interventions train the subspace).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mechdiff.callbacks.base import readable
from mechdiff.callbacks.handle_evaluation import same_end, two_engines, two_sides
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.states import read_last
from mechdiff.data.activations import ActivationPairs
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError
from mechdiff.functional.metrics import kl_from_logits
from mechdiff.functional.steering import interchange
from mechdiff.interventions.sites import Site
from mechdiff.pairs.loading import LoadedPair


class _Known(NamedTuple):
    """Prompts that both models have read, by id."""

    base: Side
    tuned: Side
    place: dict[str, int]


class CausalLoss(Callback):
    """Attaches the loss ``causal`` of `SteeringSubspaceSGD` to the frozen pair.

    Args:
        max_prompts: Prompts of the training split that are used, evenly over languages and classes; the
            validation split has as many at most. None takes all.

    Raises:
        ConfigError: If the number is below 2.
    """

    def __init__(self, max_prompts: int | None = 96) -> None:
        if max_prompts is not None and max_prompts < 2:
            raise ConfigError(f"max_prompts is {max_prompts}; allowed: 2 or more (key: max_prompts)")
        self.max_prompts = max_prompts
        self._pair: Callable[[], LoadedPair] | None = None
        self._prompts: Sequence[Prompt] = ()

    def connect(self, pair: Callable[[], LoadedPair], prompts: Sequence[Prompt], seed: int) -> None:
        """Give the callback what it runs on; nothing is drawn."""
        self._pair, self._prompts = pair, prompts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the scorer before a fit.

        Raises:
            ConfigError: If the module or its data do not fit.
        """
        if stage != "fit" or not getattr(pl_module, "needs_fit", False):
            return
        data = getattr(trainer, "datamodule", None)
        if not hasattr(pl_module, "attach_scorer") or not isinstance(data, ActivationPairs):
            name = type(pl_module).__name__
            raise ConfigError(f"{name} takes no causal loss; allowed: SteeringSubspaceSGD (key: model)")
        module: Any = pl_module  # which callbacks must not import
        if set(module.positions) != {"last"}:
            got = f"positions are {', '.join(module.positions)} with a causal loss"
            raise ConfigError(f"{got}; allowed: last (key: model.positions)")
        assert self._pair is not None, "connect() comes before a fit"
        with torch.no_grad():
            known = self._read(self._pair(), data, [Site.parse(site) for site in module.sites])
        module.attach_scorer(_scorer(known, data, float(module.penalty)))

    def _read(self, pair: LoadedPair, data: ActivationPairs, sites: Sequence[Site]) -> _Known:
        by_id = {p.id: p for p in self._prompts}
        wanted: list[Prompt] = []
        for split in ("train", "val"):
            ids = [data.prompts[i].id for i in data.joined.prompt[data.rows(split)].unique().tolist()]
            wanted += spread([by_id[i] for i in ids if i in by_id], self.max_prompts)
        kept = readable(pair, wanted)[0]
        engines = two_engines(pair)
        same = same_end(*two_sides(pair, kept, engines))
        able = [p for p, fits in zip(kept, same, strict=True) if fits]
        base, tuned = two_sides(pair, able, engines)
        for side in (base, tuned):
            read_last(side, sites)
        tuned.prefixes.clear()  # only base runs again
        return _Known(base, tuned, {p.id: i for i, p in enumerate(able)})


def _scorer(
    known: _Known, data: ActivationPairs, penalty: float
) -> Callable[[str, Tensor, Mapping[str, Any]], Tensor]:
    base, tuned = known.base, known.tuned

    def nats(site: Site, basis: Tensor, index: int, target: bool) -> Tensor:
        own, donor = base.states[index][site], tuned.states[index][site]
        hidden = interchange(own, donor.to(own), basis.to(own.device))[None]
        logits = base.engine.resume(site.layer, hidden, base.ids(index)[:, -1:], prefix=base.prefixes[index])
        reference = (tuned if target else base).log_p[index]
        return kl_from_logits(reference.to(logits.device), logits.index_select(-1, base.shared))[0]

    def score(site: str, basis: Tensor, batch: Mapping[str, Any]) -> Tensor:
        sums = {True: basis.sum() * 0.0, False: basis.sum() * 0.0}
        counts = {True: 0, False: 0}
        for number, label in zip(batch["prompt"].tolist(), batch["label"].tolist(), strict=True):
            index = known.place.get(data.prompts[number].id)
            if index is not None:
                found = nats(Site.parse(site), basis, index, bool(label))
                sums[bool(label)] = sums[bool(label)] + found.to(basis)
                counts[bool(label)] += 1
        target, neutral = (sums[label] / max(counts[label], 1) for label in (True, False))
        return target + penalty * neutral

    return score
