"""Metrics of behaviour: divergence of next-token distributions, recovery, log-odds and a refusal classifier.

1. KL(P‖Q) = Σ p·(log p − log q) in nats. It is computed as Σ [p·(log p − log q) + q − p]: the same where both
   sum to 1, and errors of the inputs' normalisation (1e-6 in float32) then cancel to first order.
2. Recovery = 1 − mean KL(P_ref‖P_patched) / mean KL(P_ref‖P_unpatched): 1 restores the reference, 0 does
   nothing.
3. Refusal log-odds = logsumexp of refusing continuations − logsumexp of complying ones.
4. A refusal is an opening that declines or defers, recognised by patterns (English, Kazakh, Russian).
"""

import re

import torch
from torch import Tensor

from mechdiff.errors import FitError
from mechdiff.functional.refusals import IDIOM, OPENING, QUOTED, REFUSAL

ROWS = 16
"""Rows of a vocabulary's width that are read at once."""


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(P‖Q) of normalised log-probabilities over the last axis.

    Args:
        log_p: Log-probabilities, `(..., vocabulary)`; −inf where p is 0.
        log_q: The same shape.

    Returns:
        Nats, `(...)`, float64; infinite where q is 0 and p is not.

    >>> log_p = torch.tensor([0.5, 0.5]).log()
    >>> kl_divergence(log_p, torch.tensor([0.25, 0.75]).log()).item()  # doctest: +ELLIPSIS
    0.14384...
    """
    log_p, log_q = log_p.to(torch.float64), log_q.to(torch.float64)
    p, q = log_p.exp(), log_q.exp()
    for name, total in (("p", p.sum(-1)), ("q", q.sum(-1))):
        assert bool(((total - 1).abs() < 1e-2).all()), (
            f"{name} is not a distribution: renormalise after selecting tokens"
        )
    return (torch.where(p > 0, p * (log_p - log_q), 0.0) + (q - p)).sum(-1)


def kl_from_logits(log_p: Tensor, logits: Tensor) -> Tensor:
    """Compute KL(P‖softmax of logits) for many rows of logits and one P, in the precision of the logits.

    KL = Σ p·log p + logsumexp(logits) − Σ p·logits; no row of log-probabilities is made, and the error is
    that of a sum in the precision of the logits: about 1e-5 nats in float32.

    Args:
        log_p: Log-probabilities, `(vocabulary,)`.
        logits: `(rows, vocabulary)`.

    Returns:
        Nats, `(rows,)`, float64.

    >>> log_p = torch.tensor([0.5, 0.5]).log()
    >>> round(kl_from_logits(log_p, torch.tensor([[0.25, 0.75]]).log() + 3)[0].item(), 4)
    0.1438
    """
    log_p = log_p.to(torch.float64)
    p = log_p.exp() / log_p.exp().sum()
    entropy = -torch.where(p > 0, p * p.log(), 0.0).sum()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    high = logits.max(-1, keepdim=True).values  # sums of small numbers lose less
    shifted = logits - high
    return log_total(shifted).double() - (shifted @ p.to(shifted)).double() - entropy


def log_total(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the logarithm of the sum of exponentials.

    A CPU takes a few rows at a time, which stay in its cache: several times as quick.

    Args:
        logits: `(..., vocabulary)`.
        allowed: Tokens that count, `(vocabulary,)` boolean; None: all.

    Returns:
        Nats, `(...)`, float32 or the type of the logits if that is wider.

    >>> log_total(torch.tensor([[0.25, 0.75], [1.0, 1.0]]).log()).exp().round(decimals=4)
    tensor([1., 2.])
    """
    rows = logits.reshape(-1, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = []
    for part in rows.split(ROWS if rows.device.type == "cpu" else max(len(rows), 1)):
        wide = part.to(dtype)
        found.append((wide if allowed is None else wide.masked_fill(~allowed, -torch.inf)).logsumexp(-1))
    return torch.cat(found).reshape(logits.shape[:-1])


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of given tokens.

    Args:
        logits: `(..., vocabulary)`.
        ids: `(...)`.

    Returns:
        Nats, `(...)`, float32 or the type of the logits if that is wider.

    >>> token_logprobs(torch.tensor([[0.25, 0.75]]).log() + 3, torch.tensor([1])).exp().round(decimals=4)
    tensor([0.7500])
    """
    return logits.gather(-1, ids.to(logits.device)[..., None])[..., 0] - log_total(logits)


def recovery(kl_patched: Tensor, kl_unpatched: Tensor) -> Tensor:
    """Compute the share of a divergence that a patch removes, as a ratio of means over prompts.

    Args:
        kl_patched: KL(P_ref‖P_patched) in nats, `(prompts,)`.
        kl_unpatched: KL(P_ref‖P_unpatched) in nats, `(prompts,)`.

    Raises:
        FitError: If there is no divergence to remove.

    >>> recovery(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0])).item()
    0.75
    """
    gap = kl_unpatched.to(torch.float64).mean()
    if not gap > 0:
        raise FitError(
            f"recovery is undefined: the unpatched divergence is {gap.item():g} nats; it must be above 0"
        )
    return 1 - kl_patched.to(torch.float64).mean() / gap


def logodds(refuse_logps: Tensor, comply_logps: Tensor) -> Tensor:
    """Compute the log-odds of refusing from sequence log-probabilities.

    Args:
        refuse_logps: Log-probabilities of refusing openings, `(..., r)`.
        comply_logps: Log-probabilities of complying openings, `(..., c)`.

    Returns:
        Nats, `(...)`, float64.

    >>> logodds(torch.tensor([0.2, 0.2]).log(), torch.tensor([0.4]).log()).abs().item() < 1e-7
    True
    """
    return refuse_logps.to(torch.float64).logsumexp(-1) - comply_logps.to(torch.float64).logsumexp(-1)


def refusal_score(text: str) -> float:
    """Say whether an answer opens by declining or deferring: 1.0 or 0.0.

    Only the first `OPENING` characters are read. Quoted words and idioms ("I cannot wait") do not count.

    >>> refusal_score("I'm sorry, but I can't help with that."), refusal_score("I cannot wait to see it!")
    (1.0, 0.0)
    >>> refusal_score("Кешіріңіз, бірақ бұл туралы айта алмаймын."), refusal_score("Я не могу помочь с этим.")
    (1.0, 1.0)
    """
    plain = re.sub(r"\s+", " ", text.translate({0x2019: "'", 0x2018: "'", 0x02BC: "'"})).strip()[:OPENING]
    return float(REFUSAL.search(IDIOM.sub(" ", QUOTED.sub(" ", plain))) is not None)
