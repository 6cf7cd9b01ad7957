"""Run what follows the attention of blocks, or one block alone; with `SuffixEngine`, on its views.

1. In a view the attention of a block is replaced by a module that returns what it is given; that block's MLP
   and the blocks above are the model's own. No attention is computed twice for the arms of one layer.
2. Arms of several layers share one run: those of a higher layer join the batch at their block, so that no
   block is run for an arm below its own, and the products of the blocks above are large.
3. The first use on a model compares with whole runs: an attention module may return something else, and a
   model may hand its blocks something of another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from mechdiff.errors import UsageError
from mechdiff.functional.stats import generator
from mechdiff.interventions.attention import attention_path, head_layers
from mechdiff.interventions.hooks import intervene, record
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.interventions.suffix import TOLERANCE, Stub, SuffixEngine, run_logits, twin


class Start(NamedTuple):
    """Rows that join a run within a block.

    Attributes:
        layer: The block.
        hidden: Its input, `(rows, T, d_model)`; None for the first block, which gets the embedding.
        attention: What its attention module is to return, `(rows, T, d_model)`.
    """

    layer: int
    hidden: Tensor | None
    attention: Tensor


class _Attended(nn.Module):
    """Stand for an attention module whose output is known for the last rows."""

    def __init__(self, module: nn.Module, before: int, output: Tensor) -> None:
        super().__init__()
        self.module, self.before, self.output = module, before, output

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if not self.before:
            return self.output, None
        own = self.module(hidden_states[: self.before], *args, **kwargs)
        own = own if isinstance(own, Tensor) else own[0]
        return torch.cat([own, self.output]), None


class _Growing(Stub):
    """Stand for a block that runs the first rows of a batch alone, and those that join it here."""

    def __init__(self, block: nn.Module, layer: int, before: int, total: int, joins: Start | None) -> None:
        super().__init__(block, None if joins is None else joins.hidden)
        self.layer, self.before, self.total = layer, before, total
        self.joining = 0 if joins is None else len(joins.attention)
        self.block = block if joins is None else _attended(block, before, joins.attention)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on the rows so far and those that join."""
        rows = [hidden_states[: self.before]]
        if self.joining:
            rows.append(hidden_states[: self.joining] if self.hidden is None else self.hidden)
        inputs = rows[-1] if not self.before else torch.cat(rows) if self.joining else rows[0]
        output = self.block(inputs, *self._narrowed(args), **self._narrowed(kwargs))
        return output if isinstance(output, Tensor) else output[0]

    def _narrowed(self, value: Any) -> Any:
        """Cut what is given for the whole batch to the rows whose attention is computed here."""
        if isinstance(value, DynamicCache):  # a copy for this run alone
            kept = value.layers[self.layer]
            assert isinstance(kept, DynamicLayer)
            assert kept.keys is not None
            assert kept.values is not None
            kept.keys, kept.values = kept.keys[: self.before], kept.values[: self.before]
        elif isinstance(value, Tensor) and value.ndim and len(value) == self.total:
            return value[: self.before]
        elif isinstance(value, tuple):
            return tuple(map(self._narrowed, value))
        elif isinstance(value, dict):
            return {key: self._narrowed(part) for key, part in value.items()}
        return value


def _attended(block: nn.Module, before: int, output: Tensor) -> nn.Module:
    """Copy a block shallowly, its attention replaced."""
    node = root = twin(block)
    *parents, name = attention_path(block).split(".")
    for parent in parents:
        child = twin(node.get_submodule(parent))
        node._modules[parent] = child
        node = child
    node._modules[name] = _Attended(node.get_submodule(name), before, output)
    return root


def resume_attended(
    engine: SuffixEngine,
    starts: Sequence[Start],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    prefix: DynamicCache | None = None,
    logits_at: Tensor | None = None,
) -> Tensor:
    """Run what follows the attention of blocks: their MLP and the blocks above.

    Args:
        engine: Of the model.
        starts: Where rows join, from the lowest block up, each block once.
        input_ids: The tokens of all rows in that order, see `SuffixEngine.resume`; so are the others. Where
            rows join at several blocks, the tokens, masks and columns of the rows of one are those of the
            first rows of all.
        attention_mask: `(rows, T)` or None.
        prefix: Keys and values of the tokens before.
        logits_at: Columns to give logits for.

    Returns:
        Logits, as in `SuffixEngine.resume`.

    Raises:
        SiteError: If the model has no such layer or the block no attention.
        UsageError: If there is no input for a block that is not the first, or the model does not allow it.
    """
    if "attended" not in engine.compared:
        engine.compared.add("attended")
        check_attended(engine)
    for start in starts:
        _check_input(engine, start.layer, start.hidden)
    joins = {start.layer: start for start in starts}
    view = engine.view(min(joins) - 1, None)
    blocks, before, total = view.get_submodule(engine.path), 0, len(input_ids)
    for layer in range(min(joins), max(joins) + 1):
        block, here = blocks.get_submodule(str(layer)), joins.get(layer)
        blocks._modules[str(layer)] = _Growing(block, layer, before, total, here)
        before += 0 if here is None else len(here.attention)
    return run_logits(view, input_ids, attention_mask, logits_at, prefix)


def run_block(
    engine: SuffixEngine,
    layer: int,
    hidden: Tensor | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> None:
    """Run one block on a given input and none of the others, for what `record` sees meanwhile.

    Args:
        engine: Of the model.
        layer: The block.
        hidden: Its input, `(rows, T, d_model)`; None for the first block, which gets the embedding.
        input_ids: The tokens, `(rows, T)`, padded on the right.
        attention_mask: `(rows, T)` or None.

    Raises:
        SiteError: If the model has no such layer.
        UsageError: If there is no input for a block that is not the first.
    """
    _check_input(engine, layer, hidden)
    view = engine.view(layer - 1, hidden if layer else None)
    blocks = view.get_submodule(engine.path)
    for index in range(layer + 1, engine.num_layers):
        blocks._modules[str(index)] = Stub(blocks.get_submodule(str(index)), None)
    run_logits(view, input_ids, attention_mask)


@torch.no_grad()
def check_attended(engine: SuffixEngine) -> None:
    """Compare runs from a given attention output with the whole model, at three layers, alone and together.

    Args:
        engine: Of the model.

    Raises:
        UsageError: If a logit is off by more than `TOLERANCE` times the largest.
    """
    model = engine.model
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    draws = generator(0, "attended")
    ids = torch.randint(0, embedding.shape[0], (2, 6), generator=draws).to(embedding.device)
    layers = head_layers(model)
    starts, truths = [], []
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        site, below = Site(layer, "attn_out"), [Site(layer - 1)] if layer else []
        with record(model, [site, *below]) as kept:
            run_logits(model, ids)
        given = kept[site] * (1 + 0.5 * torch.rand(kept[site].shape, generator=draws).to(kept[site]))
        with intervene(model, {site: lambda _value, _positions, given=given: given}):  # type: ignore[misc]
            truths.append(run_logits(model, ids))
        starts.append(Start(layer, kept[below[0]] if below else None, given))
    # As many rows as columns where there are three: what is not by row must not be taken for it.
    together = resume_attended(engine, starts, ids.repeat(len(starts), 1)).chunk(len(starts))
    for start, truth, joined in zip(starts, truths, together, strict=True):
        alone = resume_attended(engine, [start], ids)
        error = (torch.stack([alone, joined]) - truth).abs().max().item()
        allowed = TOLERANCE[truth.dtype] * truth.abs().max().item()
        if not error <= allowed:
            found = f"{type(model).__name__} resumed within block {start.layer} is off by {error:.2g} logit"
            raise UsageError(f"{found}; allowed: {allowed:.2g} (key: pair)")


def _check_input(engine: SuffixEngine, layer: int, hidden: Tensor | None) -> None:
    check_layers([Site(layer)], engine.num_layers)
    if hidden is None and layer > 0:
        raise UsageError(f"no input for block {layer}; allowed: none for block 0 alone (key: hidden)")
