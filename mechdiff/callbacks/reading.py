"""Read a graded behaviour of an edited model, with shared-vocabulary masking or without.

Where the texts that may follow are spelled alike either way, one pass serves both.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

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


class _Spelled(NamedTuple):
    """One spelling of what may follow, whether it is read with masking or without, and states of its pass."""

    layout: Layout
    maskings: list[bool]
    states: dict[Site, Tensor]


class Reading:
    """A graded behaviour of one model after one prompt.

    Args:
        voice: Spells what may follow.
        side: The model and the prompts that it has read.
        index: The prompt.
        graded: The behaviour.
        sites: Where states may be edited.
        maskings: Whether to read it with masking, without, or both.

    Attributes:
        clean: What the model as it is shows, by masking; without a masking in which it cannot be said.
    """

    def __init__(
        self,
        voice: Voice,
        side: Side,
        index: int,
        graded: Graded,
        sites: Collection[Site] = (),
        maskings: Sequence[bool] = (False,),
    ) -> None:
        self.side, self.index, self.graded = side, index, graded
        own, theirs = (
            [tokenizer(text, add_special_tokens=False).input_ids for text in graded.texts]
            for tokenizer in (voice.tokenizer, voice.partner)
        )
        spellings: dict[tuple[tuple[int, ...], ...], list[bool]] = {}
        for masking in maskings:
            texts = [voice.masked(a, b) if masking else a for a, b in zip(own, theirs, strict=True)]
            if all(texts):
                spellings.setdefault(tuple(tuple(text) for text in texts if text), []).append(masking)
        ids, model = side.ids(index), side.loaded.model
        self._allowed = torch.zeros(
            model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=ids.device
        )
        self._allowed[side.shared] = True
        self.clean: dict[bool, float] = {}
        self._spelled: list[_Spelled] = []
        for spelling, read in spellings.items():
            layout = lay_out(int(ids[0, -1]), spelling, ids.device)
            with record(model, list(sites)) as seen:
                logits = run_logits(model, layout.tokens, layout.mask, layout.columns, side.prefixes[index])
            self._spelled.append(_Spelled(layout, read, {site: seen[site] for site in sites}))
            self.clean |= self._values(logits, self._spelled[-1])

    def edited(self, site: Site, states: Mapping[K, Tensor]) -> dict[bool, dict[K, float]]:
        """Read the model with each of some states at the last position of the prompt, by masking.

        Args:
            site: Where.
            states: The states, `(d,)`.
        """
        found: dict[bool, dict[K, float]] = {masking: {} for masking in self.clean}
        for spelled in self._spelled:
            layout = spelled.layout
            for arm, state in states.items():
                hidden = spelled.states[site].clone()
                hidden[:, 0] = state
                logits = self.side.engine.resume(
                    site.layer,
                    hidden,
                    layout.tokens,
                    layout.mask,
                    prefix=self.side.prefixes[self.index],
                    logits_at=layout.columns,
                )
                for masking, value in self._values(logits, spelled).items():
                    found[masking][arm] = value
        return found

    def _values(self, logits: Tensor, spelled: _Spelled) -> dict[bool, float]:
        return {
            masking: float(
                self.graded(total_logprobs(logits, spelled.layout, self._allowed if masking else None))
            )
            for masking in spelled.maskings
        }
