"""Decode rows that continue prompts already read, each with its own edit, while another model reads along.

1. A row starts from the kept keys and values of its prompt. Rows of several prompts share a batch: what is
   shorter is padded on the left and masked, and positions count from each prompt's own first token. Layers
   that keep a window alone cannot be padded: there a batch holds rows of one prompt.
2. An edit may need the other model's state at the same token: that model reads every token of every row, in
   its own ids, up to the site, before the first model does.
3. Each step takes the most probable token; a row ends before the first stop token, or at a token that the
   other model does not have, or at the limit of tokens, of characters or of a model's context. Rows that have
   ended leave the batch when there are some.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from mechdiff.interventions.generation import Reach, context_length, thinned
from mechdiff.interventions.growing import growing
from mechdiff.interventions.hooks import Edit, intervene, record, stop_after
from mechdiff.interventions.sites import Site

Edits = Callable[[Tensor | None, Sequence[int]], Mapping[Site, Edit]]
"""From the other model's states `(rows, 1, d)`, and which rows these are, to edits of single tokens."""


def padded_together(prefixes: Sequence[DynamicCache]) -> bool:
    """Tell whether the rows of several prompts can share a batch."""
    return all(type(layer) is DynamicLayer for cache in prefixes for layer in cache.layers)


class Rows:
    """Rows that continue prompts, as one model has read them.

    Args:
        model: The model.
        prefixes: Keys and values of all tokens of each row's prompt but the last, one row each.
        last: The last token of each prompt.
    """

    def __init__(self, model: PreTrainedModel, prefixes: Sequence[DynamicCache], last: Sequence[int]) -> None:
        self.model = model
        device = next(model.parameters()).device
        self.last = torch.tensor(last, device=device)[:, None]
        size = torch.tensor([cache.get_seq_length() for cache in prefixes], device=device)
        width = int(size.max())
        self._read, self._context = size, context_length(model)
        self._mask = (torch.arange(width, device=device) >= width - size[:, None]).long()
        self._cache = copy.copy(prefixes[0])
        self._cache.layers = []
        for parts in zip(*(cache.layers for cache in prefixes), strict=True):
            layer = copy.copy(parts[0])
            layer.keys, layer.values = (
                _stacked([getattr(p, name) for p in parts]) for name in ("keys", "values")
            )
            self._cache.layers.append(layer)
        self._cache = growing(self._cache)

    @property
    def full(self) -> Tensor:
        """Which rows fill the model's context, `(rows,)`; what they read further means nothing."""
        return self._read >= self._context

    def step(self, tokens: Tensor) -> Tensor | None:
        """Read tokens `(rows, T)`; return logits `(rows, T, vocabulary)`, or None if the pass was stopped."""
        rows, length = tokens.shape
        self._mask = torch.cat([self._mask, self._mask.new_ones(rows, length)], 1)
        positions = self._read[:, None] + torch.arange(length, device=tokens.device)
        out = self.model(
            input_ids=tokens,
            attention_mask=None if bool(self._mask.all()) else self._mask,
            position_ids=positions.clamp(max=self._context - 1),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._read = self._read + length
        return None if out is None else out.logits

    def keep(self, kept: Tensor) -> None:
        """Read only some of the rows further.

        Args:
            kept: Their numbers, `(fewer rows,)`.
        """
        self._cache.batch_select_indices(kept)
        self._mask, self._read = self._mask[kept], self._read[kept]


@dataclass(frozen=True)
class Follower:
    """Another model that reads along.

    Attributes:
        rows: The same prompts as it has read them.
        site: Where its states are read.
        translate: Its id of each token of the first model, −1 where it has none, `(vocabulary,)`.
    """

    rows: Rows
    site: Site
    translate: Tensor


class Decoded(NamedTuple):
    """What was said.

    Attributes:
        answers: Token ids of each row.
        states: Of the last token of the prompt and of every token said after it, by site, `(rows, T, d)`.
        ended: Whether each row came to a stop token.
        cut: Whether each row came to a token that the other model does not have.
    """

    answers: list[list[int]]
    states: dict[Site, Tensor]
    ended: list[bool]
    cut: list[bool]


@torch.no_grad()
def decode(
    rows: Rows,
    max_new_tokens: int | Reach,
    stop_ids: Collection[int] = (),
    edits: Edits | None = None,
    follower: Follower | None = None,
    sites: Sequence[Site] = (),
) -> Decoded:
    """Continue every row greedily.

    Args:
        rows: The rows; they are read further.
        max_new_tokens: Longest answer, in tokens or in characters.
        stop_ids: Tokens that end an answer.
        edits: What is done at each step, from the states of the other model.
        follower: The other model; None where no edit needs it.
        sites: Where states are kept.
    """
    tokens, count = rows.last, len(rows.last)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=tokens.device)
    answers: list[list[int]] = [[] for _ in range(count)]
    states: dict[Site, list[Tensor]] = {site: [] for site in sites}
    at = torch.arange(count, device=tokens.device)  # the rows that are still read
    running = torch.ones(count, dtype=torch.bool, device=tokens.device)
    ended, cut = ~running, ~running
    reach = max_new_tokens if isinstance(max_new_tokens, Reach) else None
    steps = max_new_tokens.tokens if isinstance(max_new_tokens, Reach) else max_new_tokens
    left = None if reach is None else reach.left(count)
    theirs = None if follower is None else follower.rows.last
    for _ in range(steps):
        donor = None
        if follower is not None and theirs is not None:
            model, site = follower.rows.model, follower.site
            with record(model, [site]) as seen, stop_after(model, site.layer):
                follower.rows.step(theirs)
            donor = seen[site]
        acting = nullcontext() if edits is None else intervene(rows.model, edits(donor, at.tolist()))
        with acting, record(rows.model, sites) as kept:
            logits = rows.step(tokens)
        assert logits is not None
        for site in sites:
            whole = kept[site].new_zeros(count, *kept[site].shape[1:])
            states[site].append(whole.index_copy(0, at, kept[site]))
        tokens = logits[:, -1:].argmax(-1)
        ends = running & torch.isin(tokens[:, 0], stops)
        ended[at] |= ends
        running &= ~ends
        if follower is not None:
            theirs = follower.translate[tokens]
            unknown = running & (theirs[:, 0] < 0)
            cut[at] |= unknown
            running &= ~unknown
            theirs = theirs.clamp(min=0)
        for row, token, goes_on in zip(at.tolist(), tokens[:, 0].tolist(), running.tolist(), strict=True):
            if goes_on:
                answers[row].append(token)
        if left is not None and reach is not None:
            left = left - reach.begun[tokens[:, 0]]
            running &= left > 0
        for read in (rows, follower.rows) if follower is not None else (rows,):
            running &= ~read.full
        if not running.any():
            break
        if thinned(running):
            some = running.nonzero()[:, 0]
            at, tokens, running = at[some], tokens[some], running[some]
            left = None if left is None else left[some]
            rows.keep(some)
            if follower is not None and theirs is not None:
                theirs = theirs[some]
                follower.rows.keep(some)
    said = {site: torch.cat(parts, 1) for site, parts in states.items()}
    return Decoded(answers, said, ended.tolist(), cut.tolist())


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stack `(1, heads, length, width)` as rows, padded on the left."""
    most = max(part.shape[2] for part in parts)
    return torch.cat([pad(part, (0, 0, most - part.shape[2], 0)) for part in parts])
