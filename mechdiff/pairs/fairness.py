"""Compare two models on the tokens they share.

1. A prompt is kept if enough of its tokens, in both tokenisations, are in both vocabularies.
2. Next-token distributions are compared over the shared set S, renormalised (`restrict_logits`);
   filling with −inf instead makes KL a NaN (0 · ∞).
3. What lies outside S is reported beside it for each model (`lost_mass`), because
   KL(P‖Q) = P(S) · KL_S + KL_Bernoulli(P(S), Q(S)) + P(Sᶜ) · KL_Sᶜ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechdiff.errors import PairError, PromptError
from mechdiff.pairs.tokenizers import SharedVocab

KEY = "pair.min_shared_coverage"


class HasText(Protocol):
    """A prompt: an id and a text."""

    @property
    def id(self) -> str:
        """Unique name."""

    @property
    def text(self) -> str:
        """The user's message."""


P = TypeVar("P", bound=HasText)


@dataclass(frozen=True)
class FilterReport:
    """What `filter_shared` kept.

    Attributes:
        total: Number of prompts given.
        kept: Number of prompts kept.
        min_shared_coverage: The threshold.
        coverage: Share of shared tokens in the base and the tuned tokenisation of every prompt given, by id.
    """

    total: int
    kept: int
    min_shared_coverage: float
    coverage: dict[str, tuple[float, float]]


def coverage(text: str, tokenizer: PreTrainedTokenizerBase, shared: SharedVocab) -> float:
    """Return the share of a text's tokens that both models have, a fraction; 1 for a text without tokens.

    Args:
        text: The user's message, without a chat template.
        tokenizer: One of the two tokenizers.
        shared: What they share.
    """
    return _coverage(text, tokenizer, shared.mask(tokenizer))


def uses_only_shared(text: str, tok: PreTrainedTokenizerBase, shared: SharedVocab) -> bool:
    """Tell whether both models have every token of a text, as one of them splits it.

    Args:
        text: The user's message, without a chat template.
        tok: One of the two tokenizers.
        shared: What they share.
    """
    return coverage(text, tok, shared) == 1.0


def filter_shared(
    prompts: Sequence[P],
    tok_base: PreTrainedTokenizerBase,
    tok_tuned: PreTrainedTokenizerBase,
    shared: SharedVocab,
    min_shared_coverage: float = 1.0,
) -> tuple[list[P], FilterReport]:
    """Keep the prompts whose tokens are shared, in both tokenisations.

    Args:
        prompts: Prompts with an `id` and a `text`.
        tok_base: Tokenizer of the base model.
        tok_tuned: Tokenizer of the tuned model.
        shared: What they share.
        min_shared_coverage: Smallest share of shared tokens to accept, 0 to 1. The default is strict.

    Returns:
        The prompts kept, in order, and what was kept.

    Raises:
        PairError: If the threshold is out of range.
        PromptError: If no prompt reaches it.
    """
    if not 0.0 <= min_shared_coverage <= 1.0:
        raise PairError(f"{KEY} is {min_shared_coverage}; allowed: 0 to 1")
    sides = [(tokenizer, shared.mask(tokenizer)) for tokenizer in (tok_base, tok_tuned)]
    shares = [[_coverage(prompt.text, *side) for side in sides] for prompt in prompts]
    kept = [p for p, share in zip(prompts, shares, strict=True) if min(share) >= min_shared_coverage]
    if not kept:
        best = max(map(min, shares), default=0.0)
        raise PromptError(
            f"{KEY} is {min_shared_coverage} but the best of {len(prompts)} prompts has {best:.4f} of its "
            "tokens in both vocabularies; allowed: 0 to 1, and no more than that for any prompt to be kept"
        )
    by_id = {prompt.id: (share[0], share[1]) for prompt, share in zip(prompts, shares, strict=True)}
    return kept, FilterReport(len(prompts), len(kept), min_shared_coverage, by_id)


def restrict_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log-probabilities over a set of tokens, renormalised; for KL between models.

    Args:
        logits: Logits `(..., vocabulary)`.
        ids: Ids to keep `(size,)`; `base_ids` and `tuned_ids` of a `SharedVocab` give the same order.

    Returns:
        Log-probabilities `(..., size)`, in float32, or in float64 for logits in float64.
    """
    kept = logits.index_select(-1, ids.to(logits.device))
    return kept.to(_precise(logits)).log_softmax(-1)


def mask_logits_to_allowed(logits: Tensor, allowed_ids: Iterable[int] | Tensor) -> Tensor:
    """Set the logits of all other tokens to −inf; for decoding within a set of tokens.

    The KL of two distributions masked this way is NaN: use `restrict_logits` to compare models.

    Args:
        logits: Logits `(..., vocabulary)`.
        allowed_ids: Ids to keep.
    """
    return logits.masked_fill(_outside(logits, allowed_ids), float("-inf"))


def lost_mass(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the probability that a model gives to tokens outside a set, padding rows included.

    It is summed over the outside, not taken as one minus the inside, so that a small one keeps its digits.

    Args:
        logits: Logits `(..., vocabulary)`.
        ids: Ids of the set `(size,)`.

    Returns:
        Probabilities `(...,)`, in float32, or in float64 for logits in float64.
    """
    precise = logits.to(_precise(logits))
    outside = precise.masked_fill(~_outside(logits, ids), float("-inf"))
    return (outside.logsumexp(-1) - precise.logsumexp(-1)).exp()


def _coverage(text: str, tokenizer: PreTrainedTokenizerBase, mask: Tensor) -> float:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return float(mask[ids].float().mean()) if ids else 1.0


def _outside(logits: Tensor, ids: Iterable[int] | Tensor) -> Tensor:
    outside = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    inside = ids if isinstance(ids, Tensor) else torch.tensor(sorted(ids), dtype=torch.long)
    outside[inside.to(logits.device)] = False
    return outside


def _precise(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
