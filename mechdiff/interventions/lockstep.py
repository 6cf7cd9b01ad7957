"""Decode edited copies of one prompt together, while another model reads along.

1. All rows continue one prompt, whose keys and values are kept; each row has an edit of its own.
2. An edit may need the other model's state at the same token: that model reads every token of every row, in
   its own ids, up to the site, before the first model does.
3. Each step takes the most probable token; a row ends before the first stop token, or at a token that the
   other model does not have, or at the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mechdiff.interventions.hooks import Edit, intervene, record, stop_after
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import _expand

Edits = Callable[[Tensor | None], Mapping[Site, Edit]]
"""From the other model's states `(rows, 1, d)` to edits of a batch of single tokens."""


@dataclass(frozen=True)
class Start:
    """A prompt as one model has read it.

    Attributes:
        model: The model.
        prefix: Keys and values of all tokens but the last.
        last: The last token.
    """

    model: nn.Module
    prefix: DynamicCache
    last: int


@torch.no_grad()
def decode_together(
    start: Start,
    rows: int,
    max_new_tokens: int,
    edits: Edits,
    stop_ids: Collection[int] = (),
    follower: Start | None = None,
    site: Site | None = None,
    translate: Tensor | None = None,
) -> list[list[int]]:
    """Continue one prompt greedily in several rows; the answers alone.

    Args:
        start: The prompt as the edited model has read it.
        rows: How many rows.
        max_new_tokens: Longest answer.
        edits: What is done at each step, from the states of the other model.
        stop_ids: Tokens that end an answer.
        follower: The prompt as the other model has read it; None where no edit needs it.
        site: Where its states are read.
        translate: Its id of each token of the edited model, −1 where it has none, `(vocabulary,)`.

    Returns:
        Token ids of each row.
    """
    device = next(start.model.parameters()).device
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    cache = _expand(start.prefix, rows)
    tokens = torch.full((rows, 1), start.last, device=device)
    answers: list[list[int]] = [[] for _ in range(rows)]
    running = torch.ones(rows, dtype=torch.bool, device=device)
    if follower is not None:
        assert site is not None
        assert translate is not None
        theirs = torch.full((rows, 1), follower.last, device=device)
        beside = _expand(follower.prefix, rows)
    for _ in range(max_new_tokens):
        donor = None
        if follower is not None and site is not None:
            with record(follower.model, [site]) as seen, stop_after(follower.model, site.layer):
                follower.model(input_ids=theirs, past_key_values=beside, use_cache=True)
            donor = seen[site]
        with intervene(start.model, edits(donor)):
            out = start.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        running &= ~torch.isin(tokens[:, 0], stops)
        if translate is not None:
            theirs = translate[tokens]
            running &= theirs[:, 0] >= 0
            theirs = theirs.clamp(min=0)
        _keep(answers, tokens[:, 0].tolist(), running.tolist())
        if not running.any():
            break
    return answers


def _keep(answers: list[list[int]], tokens: Sequence[int], running: Sequence[bool]) -> None:
    for answer, token, goes_on in zip(answers, tokens, running, strict=True):
        if goes_on:
            answer.append(token)
