"""Attribute a number read from a model's logits to every attention head, with one backward pass.

1. A zero is ADDED to the output of every attention module, so that the gradient reaches it there and goes on
   to the layers below; replacing activations by leaves would cut off what passes through later heads.
2. In the backward pass each layer's gradient is contracted, as soon as it is there, with what its heads add
   to the residual, less what a baseline adds, and summed over positions: what is kept is one number per row,
   layer and head. Several baselines share the pass.
3. A baseline is z in the model's own columns and the output projection that goes with it. Contributions are
   compared, never z: across models the projections differ.
4. Query heads share keys and values (GQA), but each has its own z and its own part of the projection.
5. The first position, an attention sink, is not counted unless `where` says so.
6. Where a norm follows the attention module (Gemma), the gradient goes through it; it acts on the sum of the
   heads, so one head's contribution is not what reaches the residual.

See `mechdiff.functional.attribution` for the arithmetic and its sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mechdiff.errors import UsageError
from mechdiff.functional.attribution import completeness_error, gauss_legendre, head_products
from mechdiff.interventions.attention import head_layers
from mechdiff.interventions.head_runs import (
    ZERO,
    Baseline,
    Batch,
    States,
    clean_states,
    difference,
    parts,
    run_attended,
)
from mechdiff.interventions.hooks import Edit, head_weights, intervene, num_heads
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine

TOKENS_WITH_GRADIENT = 1024
"""Tokens run at once where a graph is kept."""

Score = Callable[[Tensor], Tensor]
"""Turns the logits of a batch, as `run_logits` returns them, into the numbers attributed, `(n,)`. A number
may depend on several rows; a row must not enter several numbers."""


class Attribution(NamedTuple):
    """What heads add to a number.

    Attributes:
        values: By baseline, `(rows, layers, heads)`, float64, on the CPU; positive where the head raises the
            number over its baseline.
        scores: The numbers themselves, `(n,)`, float64, on the CPU.
        layers: The layers, ascending.
    """

    values: dict[str, Tensor]
    scores: Tensor
    layers: list[int]


def attribute(
    model: nn.Module,
    batch: Batch,
    score: Score,
    baselines: Mapping[str, Baseline],
    layers: Sequence[int] | None = None,
) -> Attribution:
    """Attribute numbers to every head, to first order, for several baselines at once.

    With `ZERO` this is gradient times activation, with the contributions of another run attribution patching.

    Args:
        model: A decoder-only transformers model; its parameters may be frozen.
        batch: What it reads.
        score: What is attributed.
        baselines: What stands against a head's own contribution, by name.
        layers: Whose heads; all by default.

    Raises:
        UsageError: If a baseline does not have the model's heads.
    """
    layers = list(head_layers(model) if layers is None else layers)
    weights = {layer: head_weights(model, layer) for layer in layers}
    _check(baselines, num_heads(model))
    found: dict[str, dict[int, Tensor]] = {name: {} for name in baselines}
    counted = {name: baseline.counted(batch)[..., None] for name, baseline in baselines.items()}

    def contract(layer: int, gradient: Tensor, z: Tensor) -> None:
        own = head_products(gradient, z, weights[layer])
        for name, baseline in baselines.items():
            other = baseline_products(gradient, baseline, layer, weights[layer], own)
            found[name][layer] = ((own - other) * counted[name]).sum(1).double().cpu()

    # Tensors of inference mode cannot be part of a graph; whoever calls may be in it.
    with torch.inference_mode(False), torch.enable_grad():
        anchor = torch.zeros((), device=batch.tokens.device, requires_grad=True)
        with intervene(model, dict(tagged(layers, anchor, contract))):
            scores = score(_normal(batch).run(model))
        torch.autograd.grad(scores.double().sum(), anchor)
    values = {name: torch.stack([part[layer] for layer in layers], 1) for name, part in found.items()}
    return Attribution(values, scores.detach().double().cpu(), layers)


def grad_x_act(model: nn.Module, batch: Batch, score: Score) -> Tensor:
    """Return gradient times activation of every head, `(rows, layers, heads)`; see `attribute`."""
    return attribute(model, batch, score, {"zero": ZERO}).values["zero"]


class Integrated(NamedTuple):
    """Integrated gradients of some layers.

    Attributes:
        values: What each head adds, `(rows, layers, heads)`, float64, on the CPU.
        end: The numbers as they are, `(n,)`, float64, on the CPU.
        start: With all heads of a layer at the baseline, `(layers, n)`.
        error: Share of the difference that the values of all rows and heads of a layer miss together,
            `(layers,)`.
    """

    values: Tensor
    end: Tensor
    start: Tensor
    error: Tensor


def integrated_gradients(
    engine: SuffixEngine,
    batch: Batch,
    score: Score,
    layers: Sequence[int] | None = None,
    baseline: Baseline = ZERO,
    steps: int = 8,
    states: States | None = None,
) -> Integrated:
    """Attribute numbers to the heads of each layer along the straight line from a baseline.

    The line of a layer moves its heads alone; those of other layers follow. A node of every layer is a row of
    one batch, which it joins after that layer's attention. The two ends need no gradient: one is the clean
    run, the other is run by itself.

    Args:
        engine: Of the model.
        batch: What it reads.
        score: What is attributed.
        layers: Whose heads; all by default. They are returned from the lowest up.
        baseline: Where the lines start.
        steps: Gauss–Legendre nodes.
        states: From `clean_states`; computed if not given.

    Raises:
        UsageError: If the baseline does not have the model's heads.
    """
    _check({"baseline": baseline}, num_heads(engine.model))
    layers = sorted(head_layers(engine.model) if layers is None else layers)
    states = clean_states(engine.model, batch, layers) if states is None else states
    nodes, shares = gauss_legendre(steps)
    rows, counted = len(batch.tokens), baseline.counted(batch)[..., None]
    weights = {layer: head_weights(engine.model, layer) for layer in layers}
    means: dict[int, Tensor] = {}
    starts: list[Tensor] = []
    for part in parts(layers, batch, TOKENS_WITH_GRADIENT):
        with torch.inference_mode(False), torch.enable_grad():
            z = {layer: states.z[layer].clone() for layer in part}
            own = {layer: states.attention[layer].clone() for layer in part}
            move = {at: difference(z[at], weights[at], baseline, at) * counted for at in part}
            for node, share in zip(nodes.tolist(), shares.tolist(), strict=True):
                given = {at: (own[at] - (1 - node) * move[at]).to(own[at]).requires_grad_() for at in part}
                logits = run_attended(engine, _normal(batch), states, given)
                total = torch.stack([score(copy) for copy in logits.split(rows)]).double().sum()
                for at, gradient in zip(part, torch.autograd.grad(total, list(given.values())), strict=True):
                    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    means[at] = means.get(at, 0) + share * gradient
        with torch.no_grad():
            logits = run_attended(
                engine, batch, states, {at: (own[at] - move[at]).to(own[at]) for at in part}
            )
            starts += [score(copy).double().cpu() for copy in logits.split(rows)]
    found = []
    for at, mean in means.items():
        added = head_products(mean, states.z[at], weights[at])
        other = baseline_products(mean, baseline, at, weights[at], added)
        found.append(((added - other) * counted).sum(1).double().cpu())
    with torch.no_grad():
        values, end, start = torch.stack(found, 1), score(states.logits).double().cpu(), torch.stack(starts)
    error = completeness_error(values.sum((0, 2)), end.sum(), start.sum(1))
    return Integrated(values, end, start, error)


def tagged(
    layers: Sequence[int], anchor: Tensor, contract: Callable[[int, Tensor, Tensor], None]
) -> Iterator[tuple[Site, Edit]]:
    """Yield edits that add a zero to every attention output and hand its gradient on, with z."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Edit:
        def run(z: Tensor, _positions: Tensor) -> Tensor:
            seen[layer] = z.detach()
            return z

        return run

    def tag(layer: int) -> Edit:
        def run(output: Tensor, _positions: Tensor) -> Tensor:
            z, tagged = seen.pop(layer), output + anchor.to(output.dtype)
            tagged.register_hook(lambda gradient: contract(layer, gradient, z))
            return tagged

        return run

    for layer in layers:
        yield Site(layer, "head_z"), keep(layer)
        yield Site(layer, "attn_out"), tag(layer)


def baseline_products(
    gradient: Tensor, baseline: Baseline, layer: int, weight: Tensor, own: Tensor
) -> Tensor:
    """Contract a gradient with a baseline's contributions; `own` are those with the model's own."""
    if baseline.z is None:
        return torch.zeros_like(own)
    if layer not in baseline.z:
        return own
    return head_products(gradient, baseline.z[layer], baseline.weights.get(layer, weight))


def _normal(batch: Batch) -> Batch:
    """Return a batch of tensors that may be part of a graph."""
    parts = {
        name: part.clone()
        for name in ("tokens", "mask", "logits_at")
        if (part := getattr(batch, name)) is not None
    }
    return Batch(where=batch.where, prefix=batch.prefix, **parts)


def _check(baselines: Mapping[str, Baseline], heads: int) -> None:
    for name, baseline in baselines.items():
        counts = {z.shape[2] for z in (baseline.z or {}).values()} - {heads}
        if counts:
            got = f"baseline {name!r} has {min(counts)} heads"
            raise UsageError(f"{got}; allowed: {heads}, those of the model (key: pair)")
