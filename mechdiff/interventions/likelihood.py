"""How probable a model finds given continuations of a context.

1. The context is run once; its keys and values serve every continuation, and what the next context begins
   with in common (a template, a question) is not run again.
2. Continuations that differ in the last token alone share a row, since the last token is never read.
3. Many contexts are run together, padded on the right. A continuation is masked from the padding of its
   context, and its positions count on from its context's last token. Layers that keep a window alone cannot
   be padded: there contexts are run one after the other.
4. A continuation's log-probability is the sum over its tokens; within a set of tokens, each step is
   renormalised over the set.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mechdiff.functional.metrics import log_total
from mechdiff.interventions.suffix import SuffixEngine, run, run_logits

Asked = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A context and its continuations, in token ids."""


class Layout(NamedTuple):
    """Continuations as the rows of a batch that starts with the last token of their context.

    Attributes:
        tokens: What is read, `(rows, m)`, padded on the right.
        mask: 1 for a token, 0 for padding, `(rows, m)`.
        columns: Where logits are wanted: everywhere, `(rows, m)`.
        row: Row of each continuation, `(texts,)`.
        follow: The continuations themselves, `(texts, m)`, padded on the right.
        counts: 1 for a token of a continuation, 0 for padding, `(texts, m)`.
    """

    tokens: Tensor
    mask: Tensor
    columns: Tensor
    row: Tensor
    follow: Tensor
    counts: Tensor


class Likelihoods(NamedTuple):
    """Log-probabilities in nats, float64.

    Attributes:
        free: Of each continuation among all tokens, `(texts,)`.
        within: The same with each step renormalised over the allowed tokens; −inf where one is not allowed.
        next_logits: What follows the context, `(vocabulary,)`.
    """

    free: Tensor
    within: Tensor | None
    next_logits: Tensor


class Reader:
    """Runs contexts one after the other and remembers the last one.

    Args:
        engine: Of the model that reads.
    """

    def __init__(self, engine: SuffixEngine) -> None:
        self.engine = engine
        self.device = next(engine.model.parameters()).device
        self._ids: list[int] = []
        self._cache: DynamicCache | None = None

    @torch.no_grad()
    def read(self, context: Sequence[int]) -> DynamicCache | None:
        """Return the keys and values of a context, None if it is empty.

        Args:
            context: Token ids.
        """
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, context, strict=False))
        common = len(list(pairs))
        # Layers with a window drop what is behind it, so they cannot be cut back.
        if self._cache is None or any(type(layer) is not DynamicLayer for layer in self._cache.layers):
            common = 0
        if common == 0:
            whole = torch.tensor([list(context)], device=self.device)
            cache = self.engine.prefill(whole) if context else None
        else:
            assert self._cache is not None
            cache = _taken(self._cache, (slice(None), slice(None), slice(common)))
            if common < len(context):
                rest = torch.tensor([list(context[common:])], device=self.device)
                out = self.engine.model(
                    input_ids=rest, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = out.past_key_values
        self._ids, self._cache = list(context), cache
        return cache


def lay_out(last: int, texts: Sequence[Sequence[int]], device: torch.device) -> Layout:
    """Arrange continuations of one context in rows.

    Args:
        last: Last token of the context.
        texts: Token ids of each continuation, at least one token.
        device: Where the rows go.
    """
    assert texts, "nothing to score"
    assert all(texts), "a continuation has no token"
    inputs = [(last, *text[:-1]) for text in texts]
    rows = {read: number for number, read in enumerate(dict.fromkeys(inputs))}
    tokens, mask = _padded(list(rows), device)
    follow, counts = _padded(texts, device)
    columns = torch.arange(tokens.shape[1], device=device).expand(len(rows), -1)
    return Layout(
        tokens, mask, columns, torch.tensor([rows[i] for i in inputs], device=device), follow, counts
    )


def total_logprobs(logits: Tensor, layout: Layout, allowed: Tensor | None = None) -> Tensor:
    """Sum the log-probabilities of continuations over their tokens.

    Args:
        logits: `(rows, m, vocabulary)`, at the columns of the layout.
        layout: Where the continuations are.
        allowed: Tokens to renormalise over, `(vocabulary,)` boolean; None: all.

    Returns:
        Nats, `(texts,)`, float64; −inf for a continuation with a token that is not allowed.
    """
    norm = log_total(logits, allowed)[layout.row]
    column = torch.arange(layout.follow.shape[1], device=logits.device)
    picked = logits[layout.row[:, None], column, layout.follow].to(norm)
    if allowed is not None:
        picked = picked.where(allowed[layout.follow], -torch.inf)
    return torch.where(layout.counts > 0, picked - norm, 0.0).double().sum(1)


@torch.no_grad()
def continuation_logprobs(
    reader: Reader,
    context: Sequence[int],
    texts: Sequence[Sequence[int]],
    allowed_ids: Tensor | None = None,
    tokens_per_batch: int = 512,
) -> Likelihoods:
    """Score continuations of one context, which is run once.

    Args:
        reader: Reads the context.
        context: Token ids, at least one.
        texts: Token ids of each continuation, at least one.
        allowed_ids: Tokens to renormalise over beside all, `(size,)`.
        tokens_per_batch: Tokens of continuations run at once.
    """
    model, device = reader.engine.model, reader.device
    prefix = reader.read(context[:-1])
    free, within = torch.zeros(2, len(texts)).double()
    allowed, following = None, None
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), tuple(texts[i])))
    for batch in _batches(order, texts, tokens_per_batch):
        layout = lay_out(context[-1], [texts[i] for i in batch], device)
        logits = run_logits(model, layout.tokens, layout.mask, layout.columns, prefix)
        if allowed is None:
            allowed = _allowed(allowed_ids, logits)
        free[batch], within[batch] = _both(logits, layout, allowed)
        following = logits[0, 0] if following is None else following
    assert following is not None
    return Likelihoods(free, None if allowed is None else within, following)


@torch.no_grad()
def many_logprobs(
    reader: Reader,
    asked: Sequence[Asked],
    allowed_ids: Tensor | None = None,
    tokens_per_batch: int = 512,
) -> list[Likelihoods]:
    """Score continuations of several contexts; contexts of about one length are run together.

    Args:
        reader: Of the model.
        asked: Token ids of each context, at least one, and of its continuations, at least one.
        allowed_ids: Tokens to renormalise over beside all, `(size,)`.
        tokens_per_batch: Tokens run at once, padding included.
    """
    contexts = [context for context, _ in asked]
    found: dict[int, Likelihoods] = {}
    order = sorted(range(len(asked)), key=lambda i: (len(contexts[i]), tuple(contexts[i])))
    for batch in _batches(order, contexts, tokens_per_batch):
        scored = _together(reader, [asked[i] for i in batch], allowed_ids, tokens_per_batch)
        found.update(zip(batch, scored, strict=True))
    return [found[i] for i in range(len(asked))]


def _together(
    reader: Reader, asked: Sequence[Asked], allowed_ids: Tensor | None, most: int
) -> list[Likelihoods]:
    """Score continuations of contexts that share a batch."""
    model, device = reader.engine.model, reader.device
    tokens, mask = _padded([context for context, _ in asked], device)
    ends = mask.sum(1)
    out = run(model, tokens, logits_at=ends - 1, keep=True)
    cache, logits = out.past_key_values, out.logits
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return [continuation_logprobs(reader, *one, allowed_ids, most) for one in asked]
    allowed = _allowed(allowed_ids, logits)
    texts = [(row, tuple(text)) for row, (_, own) in enumerate(asked) for text in own]
    first = _follow([text[:1] for _, text in texts], [row for row, _ in texts], tokens, mask)
    free, within = _both(logits, first, allowed)
    longer = sorted((n for n, (_, text) in enumerate(texts) if len(text) > 1), key=lambda n: len(texts[n][1]))
    for part in _batches(longer, [text for _, text in texts], most):
        read = list(dict.fromkeys((texts[n][0], texts[n][1][:-1]) for n in part))
        number = {one: place for place, one in enumerate(read)}
        rows = torch.tensor([row for row, _ in read], device=device)
        ids, real = _padded([text for _, text in read], device)
        after = model(
            input_ids=ids,
            attention_mask=torch.cat([mask[rows], real], 1),
            position_ids=ends[rows][:, None] + torch.arange(ids.shape[1], device=device),
            past_key_values=_taken(cache, rows),
            use_cache=True,
        ).logits
        which_row = [number[texts[n][0], texts[n][1][:-1]] for n in part]
        rest = _follow([texts[n][1][1:] for n in part], which_row, ids, real)
        for whole, more in zip((free, within), _both(after, rest, allowed), strict=True):
            whole[part] += more
    counts = [len(own) for _, own in asked]
    parts = zip(free.split(counts), within.split(counts), logits[:, 0], strict=True)
    return [Likelihoods(a, None if allowed is None else b, c) for a, b, c in parts]


def _allowed(ids: Tensor | None, logits: Tensor) -> Tensor | None:
    """Return which tokens of the vocabulary are among some ids; None if there are none."""
    if ids is None:
        return None
    allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[ids.to(logits.device)] = True
    return allowed


def _both(logits: Tensor, layout: Layout, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum log-probabilities over all tokens, and over those allowed, which are often all."""
    free = total_logprobs(logits, layout).cpu()
    whole = allowed is None or bool(allowed.all())
    return free, free.clone() if whole else total_logprobs(logits, layout, allowed).cpu()


def _follow(texts: Sequence[Sequence[int]], rows: list[int], tokens: Tensor, mask: Tensor) -> Layout:
    """Say which tokens follow in which row of what is read."""
    follow, counts = _padded(texts, tokens.device)
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    return Layout(tokens, mask, columns, torch.tensor(rows, device=tokens.device), follow, counts)


def _taken(cache: DynamicCache, index: Tensor | tuple[slice, ...]) -> DynamicCache:
    """Return what an index picks from all keys and values of a cache, which stays as it is."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in taken.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys, layer.values = layer.keys[index], layer.values[index]
    return taken


def _batches(order: list[int], texts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Cut texts, shortest first, into batches of at most `most` tokens with padding."""
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(texts[i]) > most:
            batches.append([])
        batches[-1].append(i)
    return batches if order else []


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return tokens.to(device), mask.to(device)
