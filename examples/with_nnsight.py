"""A store and a handle in nnsight.

Run it as: python -m examples.with_nnsight PAIR STORE HANDLE

1. A row of a store at `resid_post.L` is the output of block L at that row's position.
2. A handle edits that output at the last token of the prompt and at every token after it.
"""

from __future__ import annotations

import sys

from nnsight import NNsight
from torch import Tensor
from transformers import PreTrainedModel

from examples.given import given
from mechdiff.handles.files import Handle


def states(model: PreTrainedModel, ids: Tensor, layer: int) -> Tensor:
    """Return the residual after a block, `(positions, d_model)`.

    Args:
        model: A decoder whose blocks are `model.model.layers`.
        ids: Tokens of one prompt, `(1, positions)`.
        layer: Which block.
    """
    traced = NNsight(model)
    with traced.trace(ids):
        residual = traced.model.layers[layer].output.save()
    return residual[0]


def steered(model: PreTrainedModel, ids: Tensor, handle: Handle) -> Tensor:
    """Return the logits of the next token under a handle, `(vocabulary,)`.

    Args:
        model: A decoder whose blocks are `model.model.layers`.
        ids: Tokens of one prompt, `(1, positions)`.
        handle: An edit of `resid_post`.
    """
    traced = NNsight(model)
    with traced.trace(ids):
        block = traced.model.layers[handle.site.layer]
        block.output[:, -1] = handle.change(block.output[:, -1])
        logits = traced.output.logits.save()
    return logits[0, -1]


if __name__ == "__main__":
    model, tokenizer, ids, positions, stored, handle = given(*sys.argv[1:])
    seen = states(model, ids, handle.site.layer)[positions]
    print(f"store against trace, largest difference: {(seen - stored).abs().max():.1e}")
    plain, moved = (
        tokenizer.decode(t.argmax()) for t in (model(ids).logits[0, -1], steered(model, ids, handle))
    )
    print(f"next token: {plain!r} as it is, {moved!r} steered")
