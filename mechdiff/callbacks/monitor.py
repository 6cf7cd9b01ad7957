"""Monitor: at which layer can a linear probe tell what the tuned model treats differently?

1. A discriminant is fitted to the last-position states of dev prompts, target against neutral, at every few
   layers of both models (`mechdiff.functional.probes`).
2. Its AUROC is read on eval prompts, of each language and of all together, with an interval over prompts.
3. Beside it probes whose dev labels were shuffled within each language: their median, and the range that
   holds 90 % of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechdiff.callbacks.base import CausalEvaluation, Item, readable
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.states import read_ends
from mechdiff.config import LAYER_STRIDE
from mechdiff.data.contrast import contrast
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError
from mechdiff.functional.handles import auroc
from mechdiff.functional.probes import auroc_interval, best_probe
from mechdiff.functional.stats import generator
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule, estimated, missing
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.results import Record

ALL = "all"
"""Stands for all languages together."""


class Monitor(CausalEvaluation):
    """Fits a probe for the class of prompts at every few layers of both models; no fitted module is used.

    Args:
        max_prompts: Prompts of each split, evenly over languages and classes; None takes all.
        stride: Step from one layer to the next; the last one is always read.
        shrinkage: Of the scatter within the classes.
        draws: Probes with shuffled labels at each layer.
        tokens_per_batch: Tokens run at once.

    Raises:
        ConfigError: If a number is below 1.
    """

    splits: ClassVar[tuple[str, ...]] = ("dev", "eval")

    def __init__(
        self,
        max_prompts: int | None = 120,
        stride: int = LAYER_STRIDE,
        shrinkage: float = 0.1,
        draws: int = 20,
        tokens_per_batch: int = 1024,
    ) -> None:
        super().__init__()
        for name, value in (("max_prompts", max_prompts), ("stride", stride), ("draws", draws)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more (key: {name})")
        self.max_prompts, self.stride, self.shrinkage = max_prompts, stride, shrinkage
        self.draws, self.tokens_per_batch = draws, tokens_per_batch

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Probe both models; see the module's docstring."""
        kept = readable(pair, prompts)[0]
        parts = {name: spread([p for p in kept if p.split == name], self.max_prompts) for name in self.splits}
        both = [p for part in parts.values() for p in part]
        contrast(both, "dev"), contrast(both, "eval")  # a class without prompts is a mistake
        for loaded, ids in ((pair.base, pair.shared.base_ids), (pair.tuned, pair.shared.tuned_ids)):
            yield from self._model(loaded, ids, both)

    def _model(self, loaded: LoadedModel, shared: Tensor, prompts: Sequence[Prompt]) -> Iterator[Record]:
        layers = sorted({*range(0, loaded.depth, self.stride), loaded.depth - 1})
        encoded = [encode(loaded.tokenizer, p.text) for p in prompts]
        side = Side(loaded, SuffixEngine(loaded.model), shared.to(loaded.device), encoded)
        ends = read_ends(side, [Site(layer) for layer in layers], self.tokens_per_batch)
        for site, states in ends.states.items():
            yield from self._site(str(site), loaded.role, states, prompts)

    def _site(self, site: str, model: str, states: Tensor, prompts: Sequence[Prompt]) -> Iterator[Record]:
        target = torch.tensor([p.label == "target" for p in prompts])
        dev = torch.tensor([p.split == "dev" for p in prompts])
        own = best_probe(states[dev & target], states[dev & ~target], self.shrinkage)(states)
        about: dict[str, Any] = {
            "question": "rq3",
            "site": site,
            "split": "eval",
            "model": model,
            "positions": "last",
            "unit": "fraction",
        }
        self.items += [
            Item(p.id, "probe_score", site, "last", model, p.label, x)
            for p, x, held in zip(prompts, own.tolist(), (~dev).tolist(), strict=True)
            if held
        ]
        shuffled = self._shuffled(site, model, states, target, dev, prompts)
        for lang in (ALL, *sorted({p.lang for p in prompts})):
            read = ~dev & torch.tensor([lang in (ALL, p.lang) for p in prompts])
            cell = {**about, "params": {"lang": lang}}
            n = int(read.sum())
            if target[read].all() or not target[read].any():
                yield missing("probe_auroc", "one_class", {**cell, "n": n})
                continue
            draws = generator(self.seed, "probe_auroc", lang)  # the same resamples at every layer
            found = auroc_interval(own[read], target[read], generator=draws)
            yield estimated("probe_auroc", found, cell)
            values = torch.tensor([auroc(scores[read], target[read]) for scores in shuffled]).double()
            low, value, high = values.quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
            cell |= {"control": "shuffled", "params": {"lang": lang, "draws": len(shuffled)}}
            yield Record(quantity="probe_auroc", value=value, low=low, high=high, n=n, **cell)

    def _shuffled(
        self, site: str, model: str, states: Tensor, target: Tensor, dev: Tensor, prompts: Sequence[Prompt]
    ) -> list[Tensor]:
        """Return the scores of probes whose dev labels were exchanged within each language."""
        langs = [
            [i for i, p in enumerate(prompts) if p.lang == lang and bool(dev[i])] for lang in _langs(prompts)
        ]
        found = []
        for draw in range(self.draws):
            draws, labels = generator(self.seed, "shuffled", site, model, draw), target.clone()
            for rows in map(torch.tensor, langs):
                if len(rows):
                    labels[rows] = target[rows[torch.randperm(len(rows), generator=draws)]]
            found.append(best_probe(states[dev & labels], states[dev & ~labels], self.shrinkage)(states))
        return found


def _langs(prompts: Sequence[Prompt]) -> list[str]:
    return sorted({p.lang for p in prompts})
