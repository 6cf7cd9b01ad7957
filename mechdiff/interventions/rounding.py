"""Round the weights of a model to half precision: a change that no one means.

Two copies of one model of which one was saved in bfloat16 differ in every weight. What they differ by is the
least that a difference of two models must exceed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mechdiff.interventions.grafts import swapped

HALF = (torch.bfloat16, torch.float16)


def rounded_weights(model: PreTrainedModel, keep: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the weights that rounding to bfloat16 changes, rounded, in their own type, by name.

    Args:
        model: Any model; of one in half precision nothing is rounded.
        keep: Names of weights to leave out.
    """
    found = {}
    for name, weight in model.named_parameters():
        if weight.dtype in HALF or name in keep:
            continue
        new = weight.detach().bfloat16().to(weight.dtype)
        if not torch.equal(new, weight):
            found[name] = new
    return found


@contextmanager
def rounded(model: PreTrainedModel) -> Iterator[None]:
    """Run a model with its weights rounded to bfloat16 within the context; it takes their size once more."""
    weights = dict(model.named_parameters())
    with swapped([(weights[name], new) for name, new in rounded_weights(model).items()]):
        yield
