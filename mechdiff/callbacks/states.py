"""Read the last position of many prompts at once: states at some sites and what would be said next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechdiff.callbacks.patcher import Side
from mechdiff.interventions.hooks import record
from mechdiff.interventions.likelihood import Reader
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import run_logits


class Ends(NamedTuple):
    """What a model makes of the last token of each prompt.

    Attributes:
        states: By site, `(prompts, d)`, on the CPU.
        log_p: Next-token log-probabilities over the shared tokens, `(prompts, shared)`, on the CPU.
    """

    states: dict[Site, Tensor]
    log_p: Tensor


def read_ends(side: Side, sites: Sequence[Site], tokens_per_batch: int = 1024) -> Ends:
    """Run prompts of similar length together, padded on the right; nothing is kept in the side.

    Args:
        side: A model and its prompts.
        sites: Where to read.
        tokens_per_batch: Tokens run at once.
    """
    start = side.fixed
    prefix = side.engine.prefill(side.ids(0)[:, :start]) if start else None
    states: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(side.encoded) for site in sites}
    log_p = [torch.empty(0)] * len(side.encoded)
    for batch in _batches([len(e) - start for e in side.encoded], tokens_per_batch):
        size = torch.tensor([len(side.encoded[i]) - start for i in batch], device=side.loaded.device)
        tokens = pad_sequence([side.ids(i)[0, start:] for i in batch], batch_first=True)
        mask = (torch.arange(tokens.shape[1], device=tokens.device) < size[:, None]).long()
        with record(side.loaded.model, sites) as seen:
            logits = run_logits(side.loaded.model, tokens, mask, size - 1, prefix)
        rows = torch.arange(len(batch), device=size.device)
        for site in sites:
            for i, state in zip(batch, seen[site][rows, size - 1].cpu(), strict=True):
                states[site][i] = state
        for i, row in zip(batch, side.restricted(logits).cpu(), strict=True):
            log_p[i] = row
    return Ends({site: torch.stack(rows) for site, rows in states.items()}, torch.stack(log_p))


def read_last(side: Side, sites: Sequence[Site]) -> None:
    """Run every prompt once; keep the states of its last token, keys and values before it, and what follows.

    What a prompt begins with in common with the one before, such as a template, is not run again.

    Args:
        side: A model and its prompts; what is kept goes there.
        sites: Sites whose states are kept, `(1, d)` each.
    """
    reader = Reader(side.engine)
    with record(side.loaded.model, sites) as seen:
        for index, encoded in enumerate(side.encoded):
            prefix = reader.read(encoded.input_ids[:-1])
            assert prefix is not None, "a rendered prompt has more than one token"
            logits = run_logits(side.loaded.model, side.ids(index)[:, -1:], prefix=prefix)
            side.states.append({site: seen[site][0].flatten(1) for site in sites})
            side.prefixes.append(prefix)
            side.log_p.append(side.restricted(logits)[0])


def _batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Cut prompts, shortest first, into batches of so many tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[i] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
