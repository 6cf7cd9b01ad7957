"""Put one model's weights of one attention head into another of the same architecture.

1. Of the query and output projections the head's own rows and columns are grafted, of keys and values those
   of its group: with grouped queries the other heads of the group then read the donor's keys and values too;
   `group` lists them.
2. Biases go with their rows. The output's bias and norms of queries and keys belong to no head: they stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechdiff.errors import PairError, UsageError
from mechdiff.interventions.grafts import component_modules, swapped
from mechdiff.interventions.hooks import num_heads

_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def group(model: PreTrainedModel, head: int) -> list[int]:
    """List the query heads that share keys and values with a head, itself among them."""
    size = num_heads(model) // key_heads(model)
    return list(range(head // size * size, (head // size + 1) * size))


@contextmanager
def head_graft(
    recipient: PreTrainedModel, donor: PreTrainedModel, layer: int, head: int
) -> Iterator[PreTrainedModel]:
    """Run the recipient with the donor's weights of one head within the context.

    Args:
        recipient: The model that runs.
        donor: The model whose weights are borrowed.
        layer: Block of the head.
        head: Query head.

    Yields:
        The recipient, its own again afterwards.

    Raises:
        UsageError: If the head does not exist.
        PairError: If the models differ in shape or have no separate projections of queries, keys and values.
    """
    heads = num_heads(recipient)
    if not 0 <= head < heads:
        raise UsageError(f"head {head} is out of range; allowed: 0 to {heads - 1} (key: head)")
    shared = head // (heads // key_heads(recipient))
    own, other = (projections(model, layer) for model in (recipient, donor))
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, index in zip(_PARTS, (head, shared, shared, head), strict=True):
        count = heads if name in ("q_proj", "o_proj") else key_heads(recipient)
        for kind, tensor in own[name].named_parameters(recurse=False):
            new = dict(other[name].named_parameters(recurse=False)).get(kind)
            if new is None or new.shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} and {None if new is None else tuple(new.shape)}"
                raise PairError(f"{name}.{kind} is {shapes}; allowed: equal shapes (key: pair)")
            axis = 1 if name == "o_proj" else 0
            if axis == 1 and kind == "bias":
                continue
            pairs.append((tensor, _mixed(tensor, new, axis, count, index)))
    with swapped(pairs):
        yield recipient


def _mixed(own: Tensor, other: Tensor, axis: int, count: int, index: int) -> Tensor:
    """Return a tensor with one of `count` equal parts along an axis from another."""
    mixed = own.detach().clone()
    width = own.shape[axis] // count
    here = torch.arange(index * width, (index + 1) * width, device=own.device)
    return mixed.index_copy(axis, here, other.detach().to(own).index_select(axis, here))


def projections(model: PreTrainedModel, layer: int) -> dict[str, nn.Module]:
    """Return the projections of queries, keys, values and output of a block, by name.

    Raises:
        PairError: If the model has no separate ones.
    """
    (attention,) = component_modules(model, f"attn.{layer}")
    found = {
        name.rsplit(".", 1)[-1]: module
        for name, module in attention.named_modules()
        if isinstance(module, nn.Linear)
    }
    if missing := [name for name in _PARTS if name not in found]:
        raise PairError(
            f"{type(attention).__name__} has no {missing[0]}; allowed for a graft of one head: separate "
            f"projections {', '.join(_PARTS)} (key: pair)"
        )
    return {name: found[name] for name in _PARTS}


def key_heads(model: PreTrainedModel) -> int:
    """Count the heads of keys and values of a block."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "num_key_value_heads", None) or num_heads(model))
