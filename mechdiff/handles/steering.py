"""Steer a model with a handle from a file, while it generates or reads.

1. Within the context every forward pass of the model is edited at the handle's site, by the arithmetic with
   which the handle was measured.
2. Which tokens are edited is settled once per forward, by their column counted from the beginning of the
   text, cached tokens included: from the last token of the prompt on. So prefill and cached decoding agree
   with running everything again, whatever the padding and the chunks.
3. Where the prompt ends is known while `generate` runs. Other forwards are told apart: one that starts a text
   is a prompt and its last token is edited; one that goes on from a cache is an answer and all of it is.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechdiff.errors import HandleError, UsageError
from mechdiff.functional.edits import check_edit
from mechdiff.handles.files import RULES, Handle, read
from mechdiff.handles.identity import weights_hash
from mechdiff.interventions.hooks import blocks_path, get_blocks, intervene
from mechdiff.interventions.sites import check_layers


@contextmanager
def steer(
    model: PreTrainedModel,
    path: str | Path | Handle,
    alpha: float | None = None,
    *,
    positions: Literal["answer", "all"] | None = None,
    prompt_tokens: Sequence[int] | Tensor | None = None,
    rows: Tensor | None = None,
    any_model: bool = False,
) -> Iterator[None]:
    """Steer a model within a context.

    Args:
        model: Any decoder-only transformers model; `generate` and forward passes are both steered.
        path: A file written by `mechdiff export`, or the handle in it.
        alpha: Strength, 1 being the whole natural edit and 0 none; the handle's own by default.
        positions: ``answer`` edits the last token of the prompt and every token of the answer, as the handle
            was measured; ``all`` every token but the first, whose state is unlike all others. The handle's
            own rule by default.
        prompt_tokens: Tokens of each prompt, `(batch,)`, for texts whose answer is already in them: the last
            of these tokens and all after it are edited.
        rows: Which rows of the batch are steered, `(batch,)`, boolean; all by default. The others stay as
            they are, bit for bit.
        any_model: Whether to steer a model with other weights than the handle was made for.

    Raises:
        HandleError: If the handle cannot be read, or is for another model or width.
        SiteError: If the model has no such layer.
        UsageError: If an argument is out of range, or prompts are padded on the right.
    """
    handle = path if isinstance(path, Handle) else read(path)
    strength = handle.manifest.alpha if alpha is None else float(alpha)
    rule = positions or handle.manifest.positions
    if not math.isfinite(strength):
        raise UsageError(f"alpha is {strength}; allowed: a finite number (key: alpha)")
    if rule not in RULES:
        raise UsageError(f"positions is {rule!r}; allowed: {', '.join(RULES)} (key: positions)")
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.bool):
        got = f"rows is {tuple(rows.shape)} {rows.dtype}"
        raise UsageError(f"{got}; allowed: (batch,) torch.bool (key: rows)")
    check_edit(handle.manifest.kind, strength)
    _check_model(handle, model, any_model)
    if strength == 0:
        yield
        return
    lengths = None if prompt_tokens is None else torch.as_tensor(prompt_tokens)
    turn = _Turn(handle, strength, rule, lengths, rows)
    decoder = model.get_submodule(blocks_path(model).rpartition(".")[0])
    generating = _replaced(model, "generate", turn.generate) if hasattr(model, "generate") else nullcontext()
    with generating, _replaced(decoder, "forward", turn.forward), intervene(model, {handle.site: turn.edit}):
        yield


class _Turn:
    """What is being read or written, and which of its tokens are edited."""

    def __init__(
        self, handle: Handle, alpha: float, rule: str, prompt_tokens: Tensor | None, rows: Tensor | None
    ) -> None:
        self.alpha, self.rule, self.prompt_tokens, self.rows = alpha, rule, prompt_tokens, rows
        self.on = functools.lru_cache(handle.to)  # one copy for every device that asks
        self.start: int | None = None  # column of the last prompt token while `generate` runs
        self.where: Tensor | None = None  # (batch, position), while a forward runs

    def generate(self, complete: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]
        prompt = next((part for part in (*given, *args[:1]) if part is not None), None)
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise UsageError("attention_mask ends in 0; allowed: padding on the left (key: attention_mask)")
        columns = 1 if prompt is None else prompt.shape[1]
        self.start = (columns if mask is None else mask.shape[1]) - 1
        try:
            return complete(*args, **kwargs)
        finally:
            self.start = None

    def forward(self, complete: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = dict(inspect.signature(complete).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        where = self._touched(tokens, past, given.get("attention_mask"))
        if self.rows is not None:
            where = where & self._each(self.rows, tokens, "rows")[:, None]
        self.where = where
        try:
            return complete(*args, **kwargs)
        finally:
            self.where = None

    def edit(self, h: Tensor, _positions: Tensor) -> Tensor:
        assert self.where is not None, "a block ran outside the forward of its decoder"
        where = self.where.to(h.device)
        if not where.any():
            return h
        first = int(where.any(0).int().argmax())  # long prompts are left alone up to here
        part = h[:, first:]
        changed = self.on(h.device).change(part, self.alpha)
        return torch.cat([h[:, :first], torch.where(where[:, first:, None], changed, part)], 1)

    def _touched(self, tokens: Tensor, past: int, mask: Tensor | None) -> Tensor:
        """Return which tokens of a forward are edited, `(batch, position)`."""
        batch, width = tokens.shape[:2]
        answer = self.rule == "answer" and self.prompt_tokens is None
        if answer and self.start is not None:
            columns = torch.arange(past, past + width, device=tokens.device)
            return (columns >= self.start).expand(batch, -1)
        if answer and past:
            return torch.ones(batch, width, dtype=torch.bool, device=tokens.device)
        if mask is None:
            mask = torch.ones(batch, past + width, dtype=torch.bool, device=tokens.device)
        if tuple(getattr(mask, "shape", ())) != (batch, past + width):
            got = f"attention_mask is {tuple(getattr(mask, 'shape', ()))}"
            raise UsageError(f"{got}; allowed: {(batch, past + width)} (key: attention_mask)")
        real = mask.bool()
        order = real.cumsum(1)  # 1 at the first token of a text
        if self.prompt_tokens is not None:
            touched = order >= self._each(self.prompt_tokens, tokens, "prompt_tokens")[:, None]
        else:
            touched = order > 1 if self.rule == "all" else order == order[:, -1:]
        return (touched & real)[:, past:]

    def _each(self, values: Tensor, tokens: Tensor, key: str) -> Tensor:
        """Give every row its value; several rows in turn may go on from one prompt."""
        batch = tokens.shape[0]
        if not len(values) or batch % len(values):
            raise UsageError(f"{key} has {len(values)} entries; allowed: {batch}, the batch (key: {key})")
        return values.to(tokens.device).repeat_interleave(batch // len(values))


def _check_model(handle: Handle, model: PreTrainedModel, any_model: bool) -> None:
    """Refuse a model that the handle was not made for.

    Raises:
        HandleError: If its width or its weights differ.
        SiteError: If it has no such layer.
    """
    m = handle.manifest
    depth, width = len(get_blocks(model)), model.config.get_text_config(decoder=True).hidden_size
    if width != m.width:
        raise HandleError(f"the handle is for states of width {m.width}; the model's are {width} (key: path)")
    check_layers([handle.site], depth, key="path")
    if any_model:
        return
    found = weights_hash(model)
    if found != m.weights:
        whose = f"{m.model} of {m.provenance.get('pair')}, weights {m.weights[:12]}"
        raise HandleError(
            f"the handle is for {whose}; this model has {found[:12]}; allowed: that model, or any_model=True "
            "(key: path)"
        )


@contextmanager
def _replaced(module: nn.Module, name: str, new: Callable[..., Any]) -> Iterator[None]:
    """Let `new(method, ...)` stand for a method of one object, and put it back whatever happens."""
    complete, own = getattr(module, name), module.__dict__.get(name)
    module.__dict__[name] = functools.wraps(complete)(functools.partial(new, complete))
    try:
        yield
    finally:
        if own is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own
