"""Read the last position of a few prompts without a store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechdiff.errors import PromptError
from mechdiff.interventions.hooks import record, stop_after
from mechdiff.interventions.sites import Site
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.loading import LoadedModel


@torch.no_grad()
def collect_last_token_resids(model: LoadedModel, prompts: Sequence[str], layer: int) -> Tensor:
    """Return the residual after a block at the last token before the answer.

    Prompts are rendered with the model's chat template and run one by one, unpadded, so that no prompt's
    state depends on the others. For more than a few hundred, extract a store.

    Args:
        model: A loaded model.
        prompts: Users' messages.
        layer: The block, from 0.

    Returns:
        ``(prompts, d_model)`` in the model's dtype, on its device.

    Raises:
        PromptError: If there is no prompt.
        SiteError: If the layer does not exist.
    """
    if not prompts:
        raise PromptError("prompts is empty; allowed: at least one message (key: prompts)")
    site, found = Site(layer), []
    with record(model.model, [site]) as kept, stop_after(model.model, layer):
        for text in prompts:
            ids = torch.tensor([encode(model.tokenizer, text).input_ids], device=model.device)
            model.model(input_ids=ids, use_cache=False)
            found.append(kept[site][0, -1])
    return torch.stack(found)
