"""Decide once, for any number of processes, which texts share a batch and which batches share a shard.

1. Texts are sorted by length and packed, padding included, under a budget of tokens.
2. Consecutive batches make a shard, which one process writes whole. Shards are dealt by their tokens.
3. So what a batch holds, and with it every bit of the result, depends neither on the number of processes nor
   on where an earlier run was interrupted. The order of the rows does not even depend on the budget.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechdiff.data.prompts import Prompt
from mechdiff.data.store import SUFFIX, USER, Rows
from mechdiff.errors import PromptError
from mechdiff.pairs.alignment import EncodedPrompt, collate, common_start, encode

KEPT = {"all": (USER, SUFFIX), "user": (USER,), "last": (USER, SUFFIX)}
"""Regions whose rows are kept under each rule; `last` keeps the final token only."""


class Batch(NamedTuple):
    """Some texts and the rows wanted from them.

    Attributes:
        input_ids: `(batch, tokens)`, padded on the right.
        where: Text in the batch and token in the text of each wanted row, `(rows, 2)`.
        rows: What the store keeps of each row.
        shard: The shard that they go to.
        start: Row of the shard at which they begin.
    """

    input_ids: Tensor
    where: Tensor
    rows: Rows
    shard: int
    start: int


@dataclass(frozen=True)
class PlannedShard:
    """Consecutive batches.

    Attributes:
        index: Its place in the plan.
        batches: Indices of the prompts of each batch.
        rows: Rows that they give.
        tokens: Tokens of the prompts after what all of them begin with.
        padded: The same with padding: what is run.
    """

    index: int
    batches: tuple[tuple[int, ...], ...]
    rows: int
    tokens: int
    padded: int

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"shard-{self.index:05d}.h5"

    @property
    def digest(self) -> str:
        """Hash of the batches: a shard packed otherwise is another shard."""
        return hashlib.blake2b(repr(self.batches).encode(), digest_size=8).hexdigest()


class Plan:
    """The batches and shards of a list of prompts.

    Args:
        encoded: The prompts as tokens.
        positions: Which rows are kept: `all`, `user` or `last`.
        tokens_per_batch: Largest batch, in tokens with padding; a longer text is a batch of its own.
        batches_per_shard: Batches in a file.

    Attributes:
        shards: What to run.
        fixed: Number of tokens that all prompts begin with; no row of theirs is kept.
    """

    def __init__(
        self, encoded: Sequence[EncodedPrompt], positions: str, tokens_per_batch: int, batches_per_shard: int
    ) -> None:
        self.encoded, self.fixed = encoded, common_start(encoded)
        self.kept = [_kept(prompt, positions) for prompt in encoded]
        batches: list[list[int]] = []
        for example in sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids)):
            if not self.kept[example]:
                continue
            longest = len(encoded[example].input_ids)
            if not batches or longest * (len(batches[-1]) + 1) > tokens_per_batch:
                batches.append([])
            batches[-1].append(example)
        groups = [batches[i : i + batches_per_shard] for i in range(0, len(batches), batches_per_shard)]
        self.shards = [self._shard(index, group) for index, group in enumerate(groups)]

    def batch(self, shard: PlannedShard, number: int, pad_id: int | None) -> Batch:
        """Build one batch of a shard."""
        start = sum(len(self.kept[example]) for batch in shard.batches[:number] for example in batch)
        examples = shard.batches[number]
        input_ids, _ = collate([self.encoded[e] for e in examples], pad_id)
        where = [(i, token) for i, example in enumerate(examples) for token in self.kept[example]]
        rows = [
            (examples[i], self.encoded[examples[i]].regions[t], self.encoded[examples[i]].offsets[t], t)
            for i, t in where
        ]
        columns = Rows(*torch.tensor(rows).unbind(-1))
        return Batch(input_ids, torch.tensor(where), columns, shard.index, start)

    def _shard(self, index: int, group: Sequence[Sequence[int]]) -> PlannedShard:
        lengths = [[len(self.encoded[example]) - self.fixed for example in batch] for batch in group]
        return PlannedShard(
            index,
            tuple(map(tuple, group)),
            rows=sum(len(self.kept[example]) for batch in group for example in batch),
            tokens=sum(map(sum, lengths)),
            padded=sum(max(batch) * len(batch) for batch in lengths),
        )


class PlannedBatches(Sequence[Batch]):
    """Batches of some shards, built when asked for.

    Not a DataLoader: Lightning would replace its sampler, or shard what is dealt already.
    """

    def __init__(self, plan: Plan, shards: Sequence[PlannedShard], pad_id: int | None) -> None:
        self.plan, self.pad_id = plan, pad_id
        self.items = [(shard, number) for shard in shards for number in range(len(shard.batches))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        shard, number = self.items[index]
        return self.plan.batch(shard, number, self.pad_id)


def deal(shards: Sequence[PlannedShard], processes: int) -> list[list[PlannedShard]]:
    """Deal shards to processes so that all have about equally many tokens to run.

    The largest goes first, each to whoever has least so far.

    Args:
        shards: What is to be run.
        processes: How many share it.

    Returns:
        The shards of each process, in the order of the plan.
    """
    hands: list[list[PlannedShard]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for shard in sorted(shards, key=lambda shard: -shard.padded):  # stable: equal ones in the plan's order
        least = loads.index(min(loads))
        hands[least].append(shard)
        loads[least] += shard.padded
    return [sorted(hand, key=lambda shard: shard.index) for hand in hands]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], context: int | None
) -> list[EncodedPrompt]:
    """Turn prompts into tokens, chat template included.

    Raises:
        PromptError: If there is none, or one is longer than the model's context.
    """
    if not prompts:
        raise PromptError(
            "no prompts to extract activations from; at least one is needed (key: pair.prompts)"
        )
    encoded = [encode(tokenizer, prompt.text) for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if context is not None and len(tokens.input_ids) > context:
            raise PromptError(
                f"prompt {prompt.id!r} has {len(tokens.input_ids)} tokens; allowed: up to {context}, "
                "the model's context (key: pair.prompts)"
            )
    return encoded


def _kept(prompt: EncodedPrompt, positions: str) -> list[int]:
    kept = [token for token, region in enumerate(prompt.regions) if region in KEPT[positions]]
    if positions == "last":
        return [token for token in kept[-1:] if token == len(prompt.input_ids) - 1]
    return kept
