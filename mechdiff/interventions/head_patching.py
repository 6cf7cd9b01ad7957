"""Exchange what heads add to the residual, exactly, and see what base's weights would make of the same input.

1. Single heads are rows of one batch, which they join after the attention of their layer: the exchange is a
   change of the attention's output, and no attention is computed twice.
2. Heads of several layers are exchanged together in a full run: each gives the baseline's contribution in
   place of what it adds in this very run, so that patches below are taken into account.
3. Own change: every attention module gets the input that it has in its own model, with the other model's
   weights. What differs is due to these weights alone; nothing upstream is inherited and nothing is aligned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechdiff.functional.attribution import head_contributions
from mechdiff.interventions.attended import run_block
from mechdiff.interventions.grafts import changed, graft
from mechdiff.interventions.head_runs import Baseline, Batch, States, run_attended
from mechdiff.interventions.hooks import Edit, head_weights, record
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits

_PROBE_TOKENS = 8
_WHOLE = 2e-2
"""Share of a residual that its parts may miss: the rounding of half precision."""


@torch.no_grad()
def patch_heads(
    engine: SuffixEngine, batch: Batch, states: States, heads: Sequence[tuple[int, int]], baseline: Baseline
) -> Tensor:
    """Put a baseline in the place of single heads, one at a time.

    Args:
        engine: Of the model.
        batch: What it reads; heads are exchanged at `where`.
        states: Its clean run.
        heads: Layer and index of each.
        baseline: What they add instead.

    Returns:
        Logits, `(heads, rows, ...)`.
    """
    found = states.logits.repeat(len(heads), *[1] * states.logits.ndim)
    # Where a baseline differs in nothing, nothing is run: the difference is 0 on every processor.
    moved = [i for i, (layer, _) in enumerate(heads) if baseline.z is None or layer in baseline.z]
    moved.sort(key=lambda i: heads[i][0])
    given: dict[int, Tensor] = {}
    for layer in sorted({heads[i][0] for i in moved}):
        chosen = [heads[i][1] for i in moved if heads[i][0] == layer]
        moves = head_changes(states.z[layer], head_weights(engine.model, layer), baseline, layer, chosen)
        moves = (moves * baseline.counted(batch)[..., None, None]).movedim(2, 0)
        given[layer] = (states.attention[layer] + moves.to(states.attention[layer])).flatten(0, 1)
    if given:
        logits = run_attended(engine, batch, states, given)
        found[torch.tensor(moved, device=found.device)] = logits.unflatten(0, (len(moved), -1))
    return found


def head_changes(
    z: Tensor, weight: Tensor, baseline: Baseline, layer: int, heads: Sequence[int] | None = None
) -> Tensor:
    """Return a baseline's contribution less that of each head, `(rows, T, heads, d_model)`.

    Args:
        z: Input of the output projection by head, `(rows, T, heads, width)`.
        weight: The projection, `(heads, width, d_model)`.
        baseline: What stands against it.
        layer: The layer.
        heads: Some of the heads; all by default.
    """
    chosen = list(range(len(weight)) if heads is None else heads)
    own = head_contributions(z[:, :, chosen], weight[chosen])
    if baseline.z is None:
        return -own
    if layer not in baseline.z:
        return torch.zeros_like(own)
    other = baseline.weights.get(layer, weight)
    return head_contributions(baseline.z[layer][:, :, chosen], other[chosen]) - own


def exchange(
    model: nn.Module, batch: Batch, chosen: Mapping[int, Tensor], baseline: Baseline
) -> dict[Site, Edit]:
    """Return edits that put a baseline in the place of chosen heads of several layers together.

    Args:
        model: The model that will run.
        batch: What it will read.
        chosen: Which heads by layer, `(rows, heads)` boolean.
        baseline: What they add instead.
    """
    edits: dict[Site, Edit] = {}
    for layer, picked in chosen.items():
        if picked.any() and (baseline.z is None or layer in baseline.z):
            swap = _Swap(head_weights(model, layer), picked, baseline, layer, baseline.counted(batch))
            edits |= {Site(layer, "head_z"): swap.keep, Site(layer, "attn_out"): swap.move}
    return edits


@dataclass
class _Swap:
    """The exchange in one layer: z is kept where it is read, and the output is moved."""

    weight: Tensor
    picked: Tensor
    baseline: Baseline
    layer: int
    where: Tensor
    z: Tensor | None = None

    def keep(self, z: Tensor, _positions: Tensor) -> Tensor:
        self.z = z
        return z

    def move(self, output: Tensor, _positions: Tensor) -> Tensor:
        assert self.z is not None, "the projection runs before the attention module returns"
        precise = torch.promote_types(output.dtype, torch.float32)
        gate = (self.where[..., None] & self.picked[:, None]).to(precise)[..., None]  # (rows, T, heads, 1)
        moved = -self._added(gate * self.z.to(precise), self.weight)
        if self.baseline.z is not None:
            weight = self.baseline.weights.get(self.layer, self.weight)
            moved = moved + self._added(gate * self.baseline.z[self.layer].to(precise), weight)
        self.z = None
        return output + moved.to(output.dtype)

    @staticmethod
    def _added(z: Tensor, weight: Tensor) -> Tensor:
        return z.flatten(-2) @ weight.flatten(0, 1).to(z.dtype)


@torch.no_grad()
def own_change(engine: SuffixEngine, donor: PreTrainedModel, batch: Batch, states: States) -> Baseline:
    """Return what heads would add with another model's q, k, v and o, on the input that they have.

    Norms before the attention stay the model's own.

    Args:
        engine: Of the model whose input it is.
        donor: The other model, of the same architecture.
        batch: What it reads, from the first token on.
        states: Its clean run.

    Returns:
        The donor's weights as a baseline; layers with equal weights are missing, since nothing differs.

    Raises:
        PairError: If the two are not of one architecture.
    """
    model = engine.model
    assert isinstance(model, PreTrainedModel)
    assert batch.prefix is None, "the donor's keys of a prefix differ"
    z: dict[int, Tensor] = {}
    for layer in states.z:
        name, site = f"attn.{layer}", Site(layer, "head_z")
        if not changed(model, donor, name):
            continue
        with graft(model, donor, name), record(model, [site]) as seen:
            run_block(engine, layer, states.hidden.get(layer), batch.tokens, batch.mask)
        z[layer] = seen[site]
    return Baseline(z, {layer: head_weights(donor, layer) for layer in z})


def mean_baseline(runs: Sequence[tuple[Batch, States]]) -> Baseline:
    """Return the mean of every head over all counted positions of some runs, the same at every position.

    Args:
        runs: Batches with their clean runs.
    """
    means = {}
    for layer in runs[0][1].z:
        rows = torch.cat([states.z[layer][batch.counted].double() for batch, states in runs])
        means[layer] = rows.mean(0)[None, None].to(runs[0][1].z[layer])
    return Baseline(means)


def carried(z: Mapping[int, Tensor], to: Tensor, source: Tensor, length: int) -> dict[int, Tensor]:
    """Put another run's z into the columns of a row, 0 where nothing is aligned.

    Args:
        z: By layer, `(1, T_other, heads, width)`.
        to: Columns, `(pairs,)`.
        source: Columns of the other run, `(pairs,)`.
        length: Number of columns.
    """
    found = {}
    for layer, part in z.items():
        row = part.new_zeros(1, length, *part.shape[2:])
        row[:, to.to(part.device)] = part[:, source.to(part.device)]
        found[layer] = row
    return found


@torch.no_grad()
def adds_up(model: nn.Module, layer: int) -> bool:
    """Tell whether a block adds what its attention and MLP put out to the residual.

    After a norm (Gemma) a head's contribution is not what reaches the residual.

    Args:
        model: A decoder-only transformers model.
        layer: The block; the first is judged by the second.
    """
    layer = max(layer, 1)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.arange(_PROBE_TOKENS, device=embedding.device)[None] % len(embedding)
    sites = [Site(layer - 1), Site(layer, "attn_out"), Site(layer, "mlp_out")]
    with record(model, [*sites, Site(layer)]) as seen:
        run_logits(model, ids)
    # The first position may be a sink, whose norm would hide the others.
    parts = torch.stack([seen[site][:, 1:].float() for site in sites]).sum(0)
    whole = seen[Site(layer)][:, 1:].float()
    return float((parts - whole).norm()) <= _WHOLE * float(whole.norm())
