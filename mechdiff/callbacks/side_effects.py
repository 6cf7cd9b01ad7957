"""What an edit costs on neutral prompts: fluency of base's own answers, and answers that turn.

1. Base answers neutral prompts greedily, once. Fluency is bits per byte of those answers, teacher-forced; an
   edit acts on the last token of the prompt and on every token of the answer. What it costs is the ratio of
   totals over prompts minus 1, with the one-sided 95 % bound of a paired bootstrap.
2. A prompt turns if base did not behave as the tuned model does on targets and the edited model does: it
   refuses, or answers with nothing but a number. The share has an exact one-sided 95 % bound, so that n
   prompts without a change still say only so much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mechdiff.functional.answers import parse_number
from mechdiff.functional.metrics import refusal_score, token_logprobs
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import bootstrap_ratio
from mechdiff.interventions.generation import Reach
from mechdiff.interventions.hooks import Edit, intervene
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.interventions.suffix import run_logits
from mechdiff.modules.base import UNTOUCHED
from mechdiff.pairs.loading import LoadedModel
from mechdiff.pairs.tokenizers import characters
from mechdiff.results import Record

ONE_SIDED = 0.9
"""Coverage of the two-sided interval whose upper end is the one-sided 95 % bound."""
MAX_BPB, MAX_PP = 0.05, 5.0
"""Most that an edit may cost: a fraction of the bits per byte, and percentage points of prompts that turn."""

ANSWER_CHARS = 64
"""Characters of an answer that are read: a refusal is recognised in them in every language. No small number
of tokens does that where one tokenizer takes a token and another ten for the same word."""

Edits = Callable[[Sequence[int], Tensor], Mapping[Site, Edit]]
"""From the numbers of the prompts of a batch, and where their answers are, to edits; `(batch, position)`."""


def turned(text: str, domain: str) -> bool:
    """Tell whether an answer is what the tuned model was tuned to give.

    Args:
        text: The answer.
        domain: ``cultural``: it declines; ``cognitive``: it is a number and nothing else.
    """
    if domain == "cultural":
        return bool(refusal_score(text))
    return parse_number(text) is not None


def answer_reach(loaded: LoadedModel, most: int = ANSWER_CHARS) -> Reach:
    """Return how far answers of a model are read.

    Args:
        loaded: The model.
        most: Characters.
    """
    rows = loaded.model.get_output_embeddings().weight.shape[0]
    return Reach(characters(loaded.tokenizer, rows).to(loaded.device), most)


def answer_nats(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    edits: Edits | None = None,
    tokens_per_batch: int = 1024,
) -> Tensor:
    """Return how improbable answers are in total, in nats, float64, `(answers,)`.

    Args:
        model: A causal language model.
        contexts: Token ids of each prompt.
        answers: Token ids of each answer, at least one.
        edits: What is done on the last token of the prompt and on those of the answer.
        tokens_per_batch: Tokens run at once.
    """
    found = torch.zeros(len(contexts), dtype=torch.float64)
    order = sorted(range(len(contexts)), key=lambda i: (len(contexts[i]) + len(answers[i]), i))
    while order:
        sizes = [len(contexts[i]) + len(answers[i]) - 1 for i in order]
        batch = order[
            : next((n for n in range(len(order), 1, -1) if n * sizes[n - 1] <= tokens_per_batch), 1)
        ]
        order = order[len(batch) :]
        found[batch] = _batch_nats(model, contexts, answers, edits, batch)
    return found


def _batch_nats(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    edits: Edits | None,
    batch: list[int],
) -> Tensor:
    read = [torch.tensor([*contexts[i], *answers[i][:-1]]) for i in batch]
    width, most = max(map(len, read)), max(len(answers[i]) for i in batch)
    tokens, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width).long()
    where = torch.full((len(batch), width), UNTOUCHED)
    columns, follow = torch.zeros(2, len(batch), most, dtype=torch.long)
    counts = torch.zeros(len(batch), most, dtype=torch.bool)
    for row, (i, ids) in enumerate(zip(batch, read, strict=True)):
        first, length = len(contexts[i]) - 1, len(answers[i])
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        where[row, first : len(ids)] = POSITIONS.index("last")
        columns[row] = (first + torch.arange(most)).clamp(max=len(ids) - 1)
        follow[row, :length], counts[row, :length] = torch.tensor(answers[i]), True
    device = model.device
    acting = nullcontext() if edits is None else intervene(model, edits(batch, where.to(device)))
    with acting:
        logits = run_logits(model, tokens.to(device), mask.to(device), columns.to(device))
    return -torch.where(counts, token_logprobs(logits, follow).double().cpu(), 0.0).sum(1)


def fluency_record(after: Tensor, before: Tensor, draws: torch.Generator, about: dict[str, Any]) -> Record:
    """Return the record of how many more bits per byte answers take.

    Args:
        after: Nats of each answer with the edit, `(prompts,)`.
        before: Nats of the same answers without it.
        draws: Source of the resamples.
        about: The other attributes of the record.
    """
    found = bootstrap_ratio(after, before, generator=draws, level=ONE_SIDED)
    high = found.high - 1 if found.high < float("inf") else None
    flags = (*about.get("flags", ()), *(("beyond_bound",) if high is None or high > MAX_BPB else ()))
    about = {**about, "flags": flags, "n": found.n, "unit": "fraction"}
    return Record(quantity="side_effect_bpb", value=found.value - 1, high=high, **about)


def turned_record(after: Sequence[bool], before: Sequence[bool], about: dict[str, Any]) -> Record:
    """Return the record of the share of neutral prompts that turn, in percentage points.

    Args:
        after: Whether each prompt's answer is of the tuned kind with the edit.
        before: The same of base.
        about: The other attributes of the record.
    """
    changed = sum(a and not b for a, b in zip(after, before, strict=True))
    found = binomial_interval(changed, len(before), side="upper")
    flags = (*about.get("flags", ()), *(("beyond_bound",) if 100 * found.high > MAX_PP else ()))
    about = {**about, "flags": flags, "n": found.n, "unit": "pp"}
    return Record(quantity="side_effect_pp", value=100 * found.value, high=100 * found.high, **about)
