"""A store and a handle in TransformerLens.

Run it as: python -m examples.with_transformer_lens PAIR STORE HANDLE

1. `resid_post.L` of a store is `blocks.L.hook_resid_post` of a bridge that holds the weights as they are.
   With `enable_compatibility_mode()` the bridge folds norms and centres weights: it is another residual then,
   and neither rows nor handles fit it.
2. The bridge changes what it is given (eager attention, a padding token), so it is given copies.
"""

from __future__ import annotations

import copy
import sys

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.given import given
from mechdiff.handles.files import Handle


def bridge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """Wrap a copy of a model and its tokenizer."""
    name = model.config.name_or_path
    own, spoken = copy.deepcopy(model), copy.deepcopy(tokenizer)
    return TransformerBridge.boot_transformers(name, hf_model=own, tokenizer=spoken, dtype=model.dtype)


def states(bridged: TransformerBridge, ids: Tensor, layer: int) -> Tensor:
    """Return the residual after a block, `(positions, d_model)`.

    Args:
        bridged: The model.
        ids: Tokens of one prompt, `(1, positions)`.
        layer: Which block.
    """
    _, cache = bridged.run_with_cache(ids)
    return cache["resid_post", layer][0]


def steered(bridged: TransformerBridge, ids: Tensor, handle: Handle) -> Tensor:
    """Return the logits of the next token under a handle, `(vocabulary,)`.

    Args:
        bridged: The model.
        ids: Tokens of one prompt, `(1, positions)`.
        handle: An edit of `resid_post`.
    """

    def edit(residual: Tensor, hook: object) -> Tensor:
        residual[:, -1] = handle.change(residual[:, -1])
        return residual

    hooks = [(f"blocks.{handle.site.layer}.hook_resid_post", edit)]
    return bridged.run_with_hooks(ids, fwd_hooks=hooks)[0, -1]


if __name__ == "__main__":
    model, tokenizer, ids, positions, stored, handle = given(*sys.argv[1:])
    bridged = bridge(model, tokenizer)
    seen = states(bridged, ids, handle.site.layer)[positions]
    print(f"store against bridge, largest difference: {(seen - stored).abs().max():.1e}")
    plain, moved = (
        tokenizer.decode(t.argmax()) for t in (model(ids).logits[0, -1], steered(bridged, ids, handle))
    )
    print(f"next token: {plain!r} as it is, {moved!r} steered")
