"""Attribute a number to the edges between heads: from what one head adds straight into what another reads.

1. The receiver's z depends on the block's input through its queries, keys and values. The gradient of the
   number at that z, taken back through this one head alone, is its gradient at the block's input.
2. Contracted with what a head below adds to the residual, less a baseline, it is the edge's attribution: the
   first-order effect of the sender's contribution on this receiver's input alone, everything else as it is.
   The receiver's norm before the attention is recomputed.
3. The logits are a receiver, too: their gradient is that at the output of the last block.
4. With grouped queries, keys and values are read by several heads; the edge is that into one query head.

An edge is direct only where a block adds what its attention puts out: with a norm after the attention (Gemma)
there are no such edges.

Source: Syed et al. 2023 (arXiv:2310.10348), equation 3, here with z in place of the separate inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.functional.attribution import head_products
from mechdiff.interventions.attribution import Score, baseline_products, tagged
from mechdiff.interventions.head_runs import Baseline, Batch, States
from mechdiff.interventions.hooks import Edit, head_weights, intervene
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine

Head = tuple[int, int]
"""Layer and query head."""


class Edge(NamedTuple):
    """From a head to a later head, or to the logits (None)."""

    sender: Head
    receiver: Head | None


def edges_among(heads: Sequence[Head]) -> list[Edge]:
    """List the edges from each head to those of later layers and to the logits."""
    chosen = sorted(heads)
    return [
        Edge(sender, receiver)
        for sender in chosen
        for receiver in [*(head for head in chosen if head[0] > sender[0]), None]
    ]


def attribute_edges(
    engine: SuffixEngine,
    batch: Batch,
    score: Score,
    heads: Sequence[Head],
    baselines: Mapping[str, Baseline],
    states: States,
) -> dict[str, Tensor]:
    """Attribute numbers to the edges among heads.

    Args:
        engine: Of the model.
        batch: What it reads, from the first token on.
        score: What is attributed.
        heads: Senders and receivers.
        baselines: What stands against a sender's contribution, by name.
        states: The clean run of every layer.

    Returns:
        By baseline, `(rows, edges)` in the order of `edges_among`, float64, on the CPU.
    """
    assert batch.prefix is None, "gradients into a prefix would be lost"
    last = max(states.z)
    receivers = {layer: sorted(h for at, h in heads if at == layer) for layer, _ in heads}
    gradients: dict[int, Tensor] = {}
    inputs: dict[Head | None, Tensor] = {}

    def keep(layer: int, gradient: Tensor, _z: Tensor) -> None:
        gradients[layer] = gradient

    def end(output: Tensor, _positions: Tensor) -> Tensor:
        tagged = output + anchor.to(output.dtype)
        tagged.register_hook(lambda gradient: inputs.update({None: gradient}))
        return tagged

    with torch.inference_mode(False), torch.enable_grad():
        anchor = torch.zeros((), device=batch.tokens.device, requires_grad=True)
        edits = dict(tagged(sorted(receivers), anchor, keep))
        with intervene(engine.model, {**edits, Site(last): end}):
            scores = score(batch.run(engine.model))
        torch.autograd.grad(scores.double().sum(), anchor)
        for layer, chosen in receivers.items():
            if layer > 0:
                back = _into(engine, batch, states, layer, chosen, gradients[layer])
                inputs |= {(layer, head): part for head, part in zip(chosen, back, strict=True)}
    found: dict[str, list[Tensor]] = {name: [] for name in baselines}
    weights = {layer: head_weights(engine.model, layer) for layer, _ in heads}
    for sender, receiver in edges_among(heads):
        layer, head = sender
        own = head_products(inputs[receiver], states.z[layer], weights[layer])
        for name, baseline in baselines.items():
            other = baseline_products(inputs[receiver], baseline, layer, weights[layer], own)
            moved = (own - other)[..., head] * baseline.counted(batch)
            found[name].append(moved.sum(1).double().cpu())
    return {name: torch.stack(columns, 1) for name, columns in found.items()}


def _into(
    engine: SuffixEngine, batch: Batch, states: States, layer: int, heads: Sequence[int], gradient: Tensor
) -> list[Tensor]:
    """Take a gradient at the attention's output back through each of some heads to the block's input."""
    hidden = states.hidden[layer].clone().requires_grad_()
    seen: dict[str, Tensor] = {}

    def keep(z: Tensor, _positions: Tensor) -> Tensor:
        seen["z"] = z
        return z

    edits: dict[Site, Edit] = {Site(layer, "head_z"): keep}
    with intervene(engine.model, edits):
        engine.run_block(layer, hidden, batch.tokens, batch.mask)
    weight = head_weights(engine.model, layer)
    back = torch.einsum("rtd,hwd->rthw", gradient, weight.to(gradient))
    found = []
    for head in heads:
        (into,) = torch.autograd.grad(seen["z"][:, :, head], hidden, back[:, :, head], retain_graph=True)
        found.append(into)
    return found
