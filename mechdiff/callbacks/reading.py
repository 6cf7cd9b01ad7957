"""Read a graded behaviour of an edited model, with shared-vocabulary masking or without."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mechdiff.callbacks.graded import Graded
from mechdiff.callbacks.patcher import Side
from mechdiff.interventions.hooks import record
from mechdiff.interventions.likelihood import Layout, lay_out, total_logprobs
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import run_logits
from mechdiff.pairs.voice import Voice

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Reading:
    """A graded behaviour of one model after one prompt."""

    side: Side
    index: int
    graded: Graded
    layout: Layout
    allowed: Tensor | None

    @classmethod
    def of(cls, voice: Voice, side: Side, index: int, graded: Graded, masking: bool) -> Reading | None:
        """Lay out what may follow; None if it cannot be said in shared tokens."""
        own, theirs = (
            [tokenizer(text, add_special_tokens=False).input_ids for text in graded.texts]
            for tokenizer in (voice.tokenizer, voice.partner)
        )
        texts = [voice.masked(a, b) if masking else a for a, b in zip(own, theirs, strict=True)]
        if not all(texts):
            return None
        ids = side.ids(index)
        layout = lay_out(int(ids[0, -1]), [text for text in texts if text], ids.device)
        if not masking:
            return cls(side, index, graded, layout, None)
        allowed = torch.zeros(
            side.loaded.model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=ids.device
        )
        allowed[side.shared] = True
        return cls(side, index, graded, layout, allowed)

    def clean(self) -> float:
        """Read the model as it is."""
        prefix = self.side.prefixes[self.index]
        rows = self.layout.tokens, self.layout.mask, self.layout.columns
        return self._value(run_logits(self.side.loaded.model, *rows, prefix))

    def edited(self, site: Site, states: Mapping[K, Tensor]) -> dict[K, float]:
        """Read the model with each of some states at the last position of the prompt."""
        layout, prefix = self.layout, self.side.prefixes[self.index]
        with record(self.side.loaded.model, [site]) as seen:
            run_logits(self.side.loaded.model, layout.tokens, layout.mask, layout.columns, prefix)
        found = {}
        for arm, state in states.items():
            hidden = seen[site].clone()
            hidden[:, 0] = state
            logits = self.side.engine.resume(
                site.layer, hidden, layout.tokens, layout.mask, prefix=prefix, logits_at=layout.columns
            )
            found[arm] = self._value(logits)
        return found

    def _value(self, logits: Tensor) -> float:
        return float(self.graded(total_logprobs(logits, self.layout, self.allowed)))
