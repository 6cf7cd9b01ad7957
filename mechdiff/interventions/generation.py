"""Decode greedily, in batches.

1. Prompts of similar length share a batch, padded on the left, so that every answer continues at the last
   column; positions count from each prompt's own first token.
2. Each step takes the most probable token, the first of equals, among all or a given set.
3. An answer ends before the first stop token, or at the limit of tokens, of characters or of the model's
   context. Rows that have ended leave the batch when there are some.

The defaults that a checkpoint brings along (temperature, penalties) play no part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mechdiff.errors import ActivationError
from mechdiff.interventions.growing import growing

RUNNING = 0.9
"""Share of a batch that goes on, from which down the rows that have ended are left out."""


class Reach(NamedTuple):
    """How far an answer goes in characters, so that no language is cut before what is looked for.

    Attributes:
        begun: How many characters begin in each token, `(vocabulary,)`.
        most: An answer ends with the token that begins this one.
    """

    begun: Tensor
    most: int

    @property
    def tokens(self) -> int:
        """Tokens after which it ends in any case: one for each byte of two to a character."""
        return 2 * self.most

    def left(self, count: int) -> Tensor:
        """Return how many characters each row may still begin, `(rows,)`."""
        return torch.full((count,), self.most, device=self.begun.device)


def context_length(model: PreTrainedModel) -> int:
    """Return the most tokens that a model takes; without a limit a number larger than any text."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def thinned(running: Tensor) -> bool:
    """Tell whether so many rows have ended that leaving them out is worth copying the others.

    Args:
        running: Which rows go on, `(rows,)` boolean.
    """
    return int(running.sum()) <= RUNNING * len(running)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Reach,
    stop_ids: Collection[int] = (),
    allowed_ids: Tensor | None = None,
    rows_per_batch: int = 128,
) -> list[list[int]]:
    """Continue prompts greedily; the answers alone, without a stop token.

    Args:
        model: A causal language model.
        prompts: Token ids of each prompt, at least one token.
        max_new_tokens: Longest answer, in tokens or in characters.
        stop_ids: Tokens that end an answer.
        allowed_ids: Tokens that may be chosen, `(size,)`; stop tokens always may. None: all.
        rows_per_batch: Prompts that run together.

    Returns:
        Token ids of each answer, in the order of the prompts.

    Raises:
        ActivationError: If the model gives logits that are not finite.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), rows_per_batch):
        batch = order[start : start + rows_per_batch]
        found = _generate_batch(model, [prompts[i] for i in batch], max_new_tokens, stop_ids, allowed_ids)
        answers.update(zip(batch, found, strict=True))
    return [answers[i] for i in range(len(prompts))]


def stop_tokens(model: PreTrainedModel, tokenizer_eos: int | None) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, the model's and those of its generation config.

    Args:
        model: A causal language model.
        tokenizer_eos: End token of its tokenizer, if it has one.
    """
    found = {tokenizer_eos} - {None}
    for config in (model.config, model.generation_config):
        ends = getattr(config, "eos_token_id", None)
        found |= set(ends) if isinstance(ends, list | tuple) else {ends} - {None}
    return sorted(int(i) for i in found if i is not None)


@torch.no_grad()
def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Reach,
    stop_ids: Collection[int],
    allowed_ids: Tensor | None,
) -> list[list[int]]:
    device, width, context = model.device, max(map(len, prompts)), context_length(model)
    assert min(map(len, prompts)) > 0, "a prompt has no token"
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    forbidden: Tensor | None = None
    cache, rows = None, torch.arange(len(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    running = torch.ones(len(prompts), dtype=torch.bool)
    reach = max_new_tokens if isinstance(max_new_tokens, Reach) else None
    steps = max_new_tokens.tokens if isinstance(max_new_tokens, Reach) else max_new_tokens
    left = None if reach is None else reach.left(len(prompts))
    for _ in range(steps):
        out = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1]
        cache = growing(out.past_key_values) if cache is None else cache
        if not logits.isfinite().all():
            raise ActivationError(
                f"{type(model).__name__} in {model.dtype} gives non-finite logits; allowed: finite ones "
                "(key: pair.dtype)"
            )
        if allowed_ids is not None:
            if forbidden is None:
                forbidden = torch.ones(logits.shape[-1], dtype=torch.bool, device=device)
                forbidden[allowed_ids.to(device)] = False
                forbidden[stops] = False
            logits = logits.masked_fill(forbidden, float("-inf"))
        tokens = logits.argmax(-1, keepdim=True)
        running &= ~torch.isin(tokens[:, 0], stops).cpu()
        for row, token, goes_on in zip(rows.tolist(), tokens[:, 0].tolist(), running.tolist(), strict=True):
            if goes_on:
                answers[row].append(token)
        if left is not None and reach is not None:
            left = left - reach.begun[tokens[:, 0]]
            running &= (left > 0).cpu()
        positions = positions[:, -1:] + 1
        running &= (positions[:, 0] < context).cpu()
        if not running.any():
            break
        positions = positions.clamp(max=context - 1)  # of rows that have ended
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if thinned(running):
            kept = running.nonzero()[:, 0]
            rows, running = rows[kept], running[kept]
            kept = kept.to(device)
            tokens, positions, mask = tokens[kept], positions[kept], mask[kept]
            cache.batch_select_indices(kept)
            left = None if left is None else left[kept]
    return answers
