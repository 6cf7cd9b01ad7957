"""What experiments on heads start from: tokens, baselines, clean runs, and runs from an attention up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mechdiff.interventions.attended import Start, resume_attended
from mechdiff.interventions.attention import head_layers
from mechdiff.interventions.hooks import record
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits

T = TypeVar("T")
TOKENS = 2048
"""Tokens run at once."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right.

    Attributes:
        tokens: Ids, `(rows, T)`.
        mask: 1 for a token, 0 for padding, `(rows, T)`; None without padding.
        where: Positions whose heads are counted or exchanged, `(rows, T)` boolean; None: all real ones but
            the first.
        logits_at: Columns where logits are wanted, `(rows,)` or `(rows, m)`; None: the last.
        prefix: Keys and values of what comes before the columns.
    """

    tokens: Tensor
    mask: Tensor | None = None
    where: Tensor | None = None
    logits_at: Tensor | None = None
    prefix: DynamicCache | None = None

    @property
    def counted(self) -> Tensor:
        """`where`, or its default."""
        if self.where is not None:
            return self.where.to(self.tokens.device)
        chosen = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask.bool()
        if self.prefix is not None:
            return chosen
        return chosen & (torch.arange(chosen.shape[1], device=chosen.device) > 0)

    def copies(self, count: int) -> Batch:
        """Return the rows so many times, copy by copy, after the same prefix."""

        def copied(part: Tensor | None) -> Tensor | None:
            return None if part is None else _copied(part, count)

        tokens = _copied(self.tokens, count)
        return Batch(tokens, copied(self.mask), copied(self.where), copied(self.logits_at), self.prefix)

    def run(self, model: nn.Module) -> Tensor:
        """Run a model on the rows."""
        return run_logits(model, self.tokens, self.mask, self.logits_at, self.prefix)


@dataclass(frozen=True)
class Baseline:
    """What heads add to the residual in place of their own contribution.

    Attributes:
        z: Input of the output projection by layer, `(rows, T, heads, width)` in the batch's columns; rows and
            T may be 1. Where a layer is missing there is no difference. None: nothing, in every layer.
        weights: The projection that goes with it by layer, `(heads, width, d_model)`; the model's own where
            it is missing.
        where: Positions that it has something for, `(rows, T)` boolean, rows may be 1; None: all.
    """

    z: Mapping[int, Tensor] | None = None
    weights: Mapping[int, Tensor] = field(default_factory=dict)
    where: Tensor | None = None

    def counted(self, batch: Batch) -> Tensor:
        """Return where heads are counted or exchanged, `(rows, T)` boolean."""
        return batch.counted if self.where is None else batch.counted & self.where.to(batch.tokens.device)


ZERO = Baseline()
"""Nothing in a head's place."""


class States(NamedTuple):
    """What a clean run leaves at the heads.

    Attributes:
        hidden: Input of each block but the first, `(rows, T, d_model)`.
        attention: Output of each attention module, `(rows, T, d_model)`.
        z: Input of each output projection by head, `(rows, T, heads, width)`.
        logits: At `logits_at`.
    """

    hidden: dict[int, Tensor]
    attention: dict[int, Tensor]
    z: dict[int, Tensor]
    logits: Tensor


def parts(chosen: Sequence[T], batch: Batch, most: int = TOKENS) -> list[list[T]]:
    """Cut what needs a copy of a batch each into parts that are run at once.

    Args:
        chosen: What is run.
        batch: The batch that is copied.
        most: Tokens of a part.
    """
    size = max(1, most // batch.tokens.numel())
    return [list(chosen[i : i + size]) for i in range(0, len(chosen), size)]


@torch.no_grad()
def clean_states(model: nn.Module, batch: Batch, layers: Iterable[int] | None = None) -> States:
    """Run a model as it is and keep what experiments on its heads start from.

    Args:
        model: A decoder-only transformers model.
        batch: What it reads.
        layers: Whose heads; all by default.
    """
    wanted = list(head_layers(model) if layers is None else layers)
    sites = [Site(layer - 1) for layer in wanted if layer]
    sites += [site for layer in wanted for site in (Site(layer, "attn_out"), Site(layer, "head_z"))]
    with record(model, sites) as seen:
        logits = batch.run(model)
    return States(
        {layer: seen[Site(layer - 1)] for layer in wanted if layer},
        {layer: seen[Site(layer, "attn_out")] for layer in wanted},
        {layer: seen[Site(layer, "head_z")] for layer in wanted},
        logits,
    )


def difference(z: Tensor, weight: Tensor, baseline: Baseline, layer: int) -> Tensor:
    """Return what all heads of a layer add together, less what a baseline adds, `(rows, T, d_model)`.

    Args:
        z: Input of the output projection by head, `(rows, T, heads, width)`.
        weight: The projection, `(heads, width, d_model)`.
        baseline: What stands against it.
        layer: The layer.
    """
    precise = torch.promote_types(z.dtype, torch.float32)
    own = z.flatten(-2).to(precise) @ weight.flatten(0, 1).to(precise)
    if baseline.z is None:
        return own
    if layer not in baseline.z:
        return torch.zeros_like(own)
    other = baseline.weights.get(layer, weight).flatten(0, 1)
    return own - baseline.z[layer].flatten(-2).to(precise) @ other.to(precise)


def run_attended(
    engine: SuffixEngine, batch: Batch, states: States, attention: Mapping[int, Tensor]
) -> Tensor:
    """Run what follows layers' attention on copies of a batch.

    Args:
        engine: Of the model.
        batch: What it reads.
        states: Its clean run.
        attention: What is put in the place of a layer's, by layer, `(copies * rows, T, d_model)`, copy by
            copy.

    Returns:
        Logits of all copies, in the order of the layers from the lowest up.
    """
    starts, rows = [], len(batch.tokens)
    for layer, given in sorted(attention.items()):
        hidden = states.hidden.get(layer)
        starts.append(Start(layer, None if hidden is None else _copied(hidden, len(given) // rows), given))
    many = batch.copies(sum(len(start.attention) for start in starts) // rows)
    return resume_attended(
        engine, starts, many.tokens, many.mask, prefix=many.prefix, logits_at=many.logits_at
    )


def _copied(part: Tensor, copies: int) -> Tensor:
    return part.repeat(copies, *[1] * (part.ndim - 1))
