"""Plant what a case says, and draw the messages on which it is looked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from mechdiff.calibration.cases import Case
from mechdiff.calibration.texts import messages
from mechdiff.data.prompts import Prompt
from mechdiff.functional.stats import generator
from mechdiff.pairs.loading import LoadedModel
from mechdiff.pairs.organisms import (
    Planted,
    plant_heads,
    plant_null,
    plant_policy,
    plant_relay,
    plant_vocabulary,
    plant_weights,
    with_rounding,
)
from mechdiff.pairs.organisms.weights import Mode

SPREAD = 5
"""Blocks of a distributed change."""
HEADS = 3
"""Heads that are edited, in blocks of their own."""
MARGIN = 0.1
"""Share of the blocks at either end in which nothing is planted: an effect must have somewhere to enter."""


def case_prompts(case: Case, seed: int) -> list[Prompt]:
    """Draw the messages of a case; they depend on the kind and the draw.

    Args:
        case: The case.
        seed: Of the calibration.
    """
    return messages(case.rank, case.prompts, generator(seed, "messages", case.kind, case.draw))


def plant(base: LoadedModel, case: Case, prompts: Sequence[Prompt], seed: int) -> Planted:
    """Make the sibling of a case.

    Args:
        base: In single or double precision; it is left as it is.
        case: What is planted.
        prompts: Its messages.
        seed: Of the calibration.

    Returns:
        The sibling and the truth.
    """
    draws = generator(seed, "place", case.kind, case.draw)
    own = int(torch.randint(2**31, (1,), generator=draws))
    first, last = _inner(base.depth)
    blocks = (first + torch.randperm(last - first + 1, generator=draws)).tolist()
    kind, strength = case.family, case.strength
    if kind in ("copy", "halves"):
        return plant_null(base, "copy")
    if kind == "bf16":
        return plant_null(base, "bf16")
    if kind == "vocabulary":
        return plant_vocabulary(base, seed=own)
    if kind == "policy":
        topics, neutral = _by_topic(prompts, case.rank), _texts(prompts, "neutral")
        planted = plant_policy(base, blocks[0], topics, strength, neutral, own, even=True)
    elif kind == "relay":
        write, read = _apart(blocks, base.depth)
        planted = plant_relay(
            base,
            write,
            read,
            _texts(prompts, "target"),
            strength,
            _texts(prompts, "neutral"),
            seed=own,
        )
    elif kind in ("block", "spread"):
        chosen = sorted(blocks[: 1 if kind == "block" else SPREAD])
        planted = plant_weights(base, [f"block.{layer}" for layer in chosen], strength, seed=own)
    else:
        mode, strength = ("flip", 1.0) if kind == "swapped" else (kind, strength)
        drawn = torch.randint(base.num_heads, (HEADS,), generator=draws).tolist()
        heads = list(zip(sorted(blocks[:HEADS]), drawn, strict=False))
        planted = plant_heads(base, heads, cast(Mode, mode), strength, own)
    return with_rounding(planted)


def _inner(depth: int) -> tuple[int, int]:
    """Return the first and the last block in which something may be planted."""
    margin = max(1, round(MARGIN * depth)) if depth > 2 else 0
    return margin, depth - 1 - margin if depth > 2 * margin else depth - 1


def _apart(blocks: Sequence[int], depth: int) -> tuple[int, int]:
    """Return two blocks a sixth of the depth apart or more, the lower first."""
    least = max(1, depth // 6)
    pairs = ((min(a, b), max(a, b)) for a in blocks for b in blocks if abs(a - b) >= least)
    return next(pairs)


def _texts(prompts: Sequence[Prompt], label: str) -> list[str]:
    return [p.text for p in prompts if p.label == label]


def _by_topic(prompts: Sequence[Prompt], topics: int) -> list[list[str]]:
    """Return the targets' messages by topic, which take turns in every split."""
    found: list[list[str]] = [[] for _ in range(topics)]
    for split in ("fit", "dev", "eval"):
        targets = [p for p in prompts if p.label == "target" and p.split == split]
        for i, prompt in enumerate(targets):
            found[i % topics].append(prompt.text)
    return found
