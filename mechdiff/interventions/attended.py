"""Run what follows the attention of a block, or one block alone; with `SuffixEngine`, on its views.

1. In a view the attention of one block is replaced by a module that returns what it is given; that block's
   MLP and the blocks above are the model's own. No attention is computed twice for the arms of one layer.
2. The first use on a model compares with whole runs: an attention module may return something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mechdiff.errors import UsageError
from mechdiff.functional.stats import generator
from mechdiff.interventions.attention import attention_path, head_layers
from mechdiff.interventions.hooks import intervene, record
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.interventions.suffix import TOLERANCE, Stub, SuffixEngine, run_logits, twin


class _Attended(nn.Module):
    """Stand for an attention module whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return self.output, None


def resume_attended(
    engine: SuffixEngine,
    layer: int,
    hidden: Tensor | None,
    attention: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    prefix: DynamicCache | None = None,
    logits_at: Tensor | None = None,
) -> Tensor:
    """Run what follows the attention of a block: its MLP and the blocks above.

    Args:
        engine: Of the model.
        layer: The block whose attention is replaced.
        hidden: Its input, `(rows, T, d_model)`; None for the first block, which gets the embedding.
        attention: What its attention module is to return, `(rows, T, d_model)`.
        input_ids: See `SuffixEngine.resume`; so are the others.
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
    view = engine.view(layer - 1, _input(engine, layer, hidden))
    blocks = view.get_submodule(engine.path)
    node = block = twin(blocks.get_submodule(str(layer)))
    *parents, name = attention_path(block).split(".")
    for parent in parents:
        child = twin(node.get_submodule(parent))
        node._modules[parent] = child
        node = child
    node._modules[name] = _Attended(attention)
    blocks._modules[str(layer)] = block
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
    view = engine.view(layer - 1, _input(engine, layer, hidden))
    blocks = view.get_submodule(engine.path)
    for index in range(layer + 1, engine.num_layers):
        blocks._modules[str(index)] = Stub(blocks.get_submodule(str(index)), None)
    run_logits(view, input_ids, attention_mask)


@torch.no_grad()
def check_attended(engine: SuffixEngine) -> None:
    """Compare runs from a given attention output with the whole model, at three layers.

    Args:
        engine: Of the model.

    Raises:
        UsageError: If a logit is off by more than `TOLERANCE` times the largest.
    """
    model = engine.model
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    draws = generator(0, "attended")
    ids = torch.randint(0, embedding.shape[0], (2, 8), generator=draws).to(embedding.device)
    layers = head_layers(model)
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        site, below = Site(layer, "attn_out"), [Site(layer - 1)] if layer else []
        with record(model, [site, *below]) as kept:
            run_logits(model, ids)
        given = kept[site] * (1 + 0.5 * torch.rand(kept[site].shape, generator=draws).to(kept[site]))
        with intervene(model, {site: lambda _value, _positions, given=given: given}):  # type: ignore[misc]
            truth = run_logits(model, ids)
        hidden = kept[below[0]] if below else None
        error = (resume_attended(engine, layer, hidden, given, ids) - truth).abs().max().item()
        allowed = TOLERANCE[given.dtype] * truth.abs().max().item()
        if not error <= allowed:
            found = f"{type(model).__name__} resumed within block {layer} is off by {error:.2g} logit"
            raise UsageError(f"{found}; allowed: {allowed:.2g} (key: pair)")


def _input(engine: SuffixEngine, layer: int, hidden: Tensor | None) -> Tensor | None:
    check_layers([Site(layer)], engine.num_layers)
    if hidden is None and layer > 0:
        raise UsageError(f"no input for block {layer}; allowed: none for block 0 alone (key: hidden)")
    return None if layer == 0 else hidden
