"""Find the rows that two stores have in common, and deal their prompts to train, val and test.

1. Rows are joined on (example, region, offset): tokens that end at the same byte of the user's text, and the
   template tokens after it whose bytes agree, counted from the end. The first token of a prompt, an attention
   sink, is left out. What finds no partner is counted, never guessed.
2. Prompts that share a topic or a template form a component; components, not tokens, are dealt to the splits,
   separately for every language and label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.config import SEED
from mechdiff.data.manifest import Example
from mechdiff.data.store import POSITIONS, SUFFIX, USER, ActivationStore
from mechdiff.errors import StoreError
from mechdiff.functional.stats import generator

SPLITS = ("train", "val", "test")


class Coverage(NamedTuple):
    """How many rows of one kind found a partner.

    Attributes:
        lang: Language of the prompts.
        position: One of `POSITIONS`, as the target store has it.
        source: Rows in the source store.
        target: Rows in the target store.
        aligned: Rows of the join.
    """

    lang: str
    position: str
    source: int
    target: int
    aligned: int


class Join(NamedTuple):
    """Rows that two stores have in common, in the order of the source store.

    Attributes:
        source: Row of the source store, `(rows,)`.
        target: Row of the target store, `(rows,)`.
        prompt: Index of the prompt, `(rows,)`.
        group: Index into `POSITIONS`, `(rows,)`.
    """

    source: Tensor
    target: Tensor
    prompt: Tensor
    group: Tensor


def join(source: ActivationStore, target: ActivationStore) -> Join:
    """Find the rows that stand for the same place in both stores.

    Raises:
        StoreError: If the stores were made from different texts.
    """
    if source.identity.prompts != target.identity.prompts:
        raise StoreError(
            f"{source.folder} and {target.folder} were made from other texts: {source.identity.prompts} and "
            f"{target.identity.prompts} (key: data.source, data.target)"
        )
    common = len(list(takewhile(_same, zip(source.suffix[::-1], target.suffix[::-1], strict=False))))
    keys = [_keys(store, common) for store in (source, target)]
    # Rows with the same key in one store cannot be told apart, so they have no partner.
    (a, rows_a), (b, rows_b) = (_unique(*key) for key in keys)
    at = torch.searchsorted(b, a).clamp(max=max(len(b) - 1, 0))
    hit = b[at] == a if len(b) else torch.zeros(len(a), dtype=torch.bool)
    rows_a, rows_b = rows_a[hit], rows_b[at[hit]]
    order = rows_a.argsort()
    rows_a, rows_b = rows_a[order], rows_b[order]
    # A place is the last one before the answer only if it is so for both models.
    user = torch.full_like(rows_a, POSITIONS.index("user"))
    groups = source.groups[rows_a], target.groups[rows_b]
    group = torch.where(groups[0] == groups[1], groups[0], user)
    return Join(rows_a, rows_b, source.rows.example[rows_a], group)


def split_components(examples: Sequence[Example], val_frac: float, seed: int = SEED) -> dict[str, list[int]]:
    """Deal prompts to train, val and test so that no two splits share a topic or a template.

    Args:
        examples: The prompts.
        val_frac: Share of components for val, and again for test.
        seed: Seed of the dealing.

    Returns:
        Indices of the prompts of each split, ascending.

    Raises:
        StoreError: If there are fewer than three components.
    """
    strata: dict[tuple[str, str], list[list[int]]] = defaultdict(list)
    components = _components(examples)
    for component in components:
        first = examples[component[0]]
        strata[first.lang, first.label].append(component)
    pooled: list[list[int]] = []  # of strata too small to be dealt by themselves
    for key in sorted(strata):
        if len(strata[key]) < len(SPLITS):
            pooled += strata.pop(key)
    if len(pooled) >= len(SPLITS):
        strata["", ""] = pooled
    elif not strata:
        raise StoreError(
            f"the prompts form {len(components)} groups that share no topic or template; allowed: "
            f"{len(SPLITS)} or more, to fit, choose and test (key: pair.prompts)"
        )
    else:
        strata[max(strata, key=lambda k: len(strata[k]))] += pooled
    dealt: dict[str, list[int]] = {split: [] for split in SPLITS}
    for key in sorted(strata):
        order = torch.randperm(len(strata[key]), generator=generator(seed, "split", *key)).tolist()
        held = max(1, round(val_frac * len(order)))
        for place, which in enumerate(order):
            split = "val" if place < held else "test" if place < 2 * held else "train"
            dealt[split] += strata[key][which]
    return {split: sorted(indices) for split, indices in dealt.items()}


def _keys(store: ActivationStore, common: int) -> tuple[Tensor, Tensor]:
    """Return one integer per row that can be joined, `(rows,)`, and its row."""
    example, region, offset, position = store.rows
    fits = (region == USER) | ((region == SUFFIX) & (offset >= -common))
    rows = (fits & (position > 0)).nonzero().flatten()
    return ((example << 32) + offset + (1 << 31))[rows], rows  # offsets are negative in the template only


def _unique(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    _, inverse, counts = keys.unique(return_inverse=True, return_counts=True)
    single = counts[inverse] == 1
    keys, rows = keys[single], rows[single]
    order = keys.argsort()
    return keys[order], rows[order]


def _same(pair: tuple[bytes, bytes]) -> bool:
    return pair[0] == pair[1]


def _components(examples: Sequence[Example]) -> list[list[int]]:
    """Group the examples that are linked by topics and templates, in order of their first."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for example in examples:
        parent[root(("topic", example.topic))] = root(("template", example.template))
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        found[root(("topic", example.topic))].append(index)
    return list(found.values())
