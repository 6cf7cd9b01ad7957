"""Tell whether a model in memory is the one that a handle was made for."""

from __future__ import annotations

import torch
import xxhash
from torch import nn

from mechdiff.errors import HandleError


def weights_hash(model: nn.Module) -> str:
    """Hash the names, shapes and values of all weights.

    Values are rounded to bfloat16 first, so that a model has one hash in float32 and in bfloat16. In float16,
    or quantised, it has another, and so it has with an adapter that is not merged. What a configuration says
    plays no part.

    Args:
        model: The model.

    Raises:
        HandleError: If some weights are not in memory.
    """
    digest = xxhash.xxh3_128()
    for name, weight in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        if weight.is_meta:
            raise HandleError(f"weight {name} is not in memory; load the whole model, or pass any_model=True")
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        rounded = weight.detach().to(torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.int16).cpu().numpy().data)
    return digest.hexdigest()
