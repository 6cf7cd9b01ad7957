"""Run a model with heads exchanged, on one case at a time: single heads, and sets of heads together.

An effect is the number as it is less the number with the baseline in the heads' place, so that it has the
sign of an attribution: positive where the heads raise the number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechdiff.callbacks.head_cases import Case
from mechdiff.interventions.attribution import integrated_gradients
from mechdiff.interventions.head_edges import Head
from mechdiff.interventions.head_patching import exchange, patch_heads
from mechdiff.interventions.head_runs import Baseline, Batch, clean_states, parts
from mechdiff.interventions.hooks import intervene


def effects(case: Case, baseline: Baseline, heads: Sequence[Head]) -> Tensor:
    """Return the exact effect of each head alone, `(heads,)`, float64.

    Args:
        case: The prompt.
        baseline: What is put in a head's place, in the columns of the whole batch.
        heads: Which heads.
    """
    batch, given = _placed(case, case.short), case.shortened(baseline)
    states = clean_states(case.side.loaded.model, batch, sorted({layer for layer, _ in heads}))
    clean = float(case.score(states.logits))
    found: dict[Head, float] = {}
    for part in parts(sorted(heads), batch):
        logits = patch_heads(case.side.engine, batch, states, part, given)
        found |= {head: clean - float(case.score(x)) for head, x in zip(part, logits, strict=True)}
    return torch.tensor([found[head] for head in heads], dtype=torch.float64)


@torch.no_grad()
def joint_scores(case: Case, baseline: Baseline, sets: Tensor, layers: Sequence[int]) -> Tensor:
    """Return the number with each of some sets of heads exchanged together, `(sets,)`, float64.

    Args:
        case: The prompt.
        baseline: What is put in their place, in the columns of the whole batch.
        sets: Which heads, `(sets, layers, heads)` boolean.
        layers: The layers.
    """
    batch, given = _placed(case, case.short), case.shortened(baseline)
    rows, model, found = len(batch.tokens), case.side.loaded.model, []
    for part in parts(range(len(sets)), batch):
        chosen = sets[list(part)].to(batch.tokens.device).repeat_interleave(rows, 0)
        many = batch.copies(len(part))
        picks = {layer: chosen[:, i] for i, layer in enumerate(layers)}
        with intervene(model, exchange(model, many, picks, given)):
            logits = many.run(model)
        found += [float(case.score(x)) for x in logits.split(rows)]
    return torch.tensor(found, dtype=torch.float64)


def integrated(case: Case, baseline: Baseline, layers: Sequence[int], steps: int) -> tuple[Tensor, Tensor]:
    """Return integrated gradients of heads, `(layers, heads)`, and sums, ends and starts, `(layers, 3)`."""
    batch, given = _placed(case, case.short), case.shortened(baseline)
    found = integrated_gradients(case.side.engine, batch, case.score, layers, given, steps)
    values = found.values.sum(0)
    return values, torch.stack([values.sum(1), found.end.expand(len(layers)), found.start[:, 0]], 1)


def _placed(case: Case, batch: Batch) -> Batch:
    where = case.inner[:, case.start :].expand(len(batch.tokens), -1)
    return Batch(batch.tokens, batch.mask, where, batch.logits_at, batch.prefix)
