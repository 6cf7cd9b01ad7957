"""Read the last position of a few prompts, and compare two models there, without a store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechdiff.errors import PromptError
from mechdiff.functional.cka import cka_jackknife
from mechdiff.functional.stats import Groups, Interval
from mechdiff.interventions.hooks import record, stop_after
from mechdiff.interventions.sites import Site
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.loading import LoadedModel


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
    return collect_last_token(model, prompts, [Site(layer)])[Site(layer)]


@torch.no_grad()
def collect_last_token(
    model: LoadedModel, prompts: Sequence[str], sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """Do the same at several sites in one pass.

    Args:
        model: A loaded model.
        prompts: Users' messages.
        sites: Where to read.

    Returns:
        ``(prompts, width)`` of each site; heads side by side.

    Raises:
        PromptError: If there is no prompt.
        SiteError: If a site does not exist.
    """
    if not prompts:
        raise PromptError("prompts is empty; allowed: at least one message (key: prompts)")
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    with record(model.model, sites) as kept, stop_after(model.model, max(site.layer for site in sites)):
        for text in prompts:
            ids = torch.tensor([encode(model.tokenizer, text).input_ids], device=model.device)
            model.model(input_ids=ids, use_cache=False)
            for site in sites:
                rows[site].append(kept[site][0, -1].flatten())
    return {site: torch.stack(found) for site, found in rows.items()}


def cka_by_layer(
    base: LoadedModel,
    tuned: LoadedModel,
    prompts: Sequence[str],
    layers: Sequence[int],
    *,
    debiased: bool = True,
    within: Groups | None = None,
) -> dict[int, Interval]:
    """Compare the residuals of two models by linear CKA, layer by layer, straight from the models.

    Args:
        base: A loaded model.
        tuned: The other one.
        prompts: Users' messages.
        layers: Blocks, from 0.
        debiased: Use the unbiased estimate, which needs 5 prompts.
        within: Class of each prompt, to compare within classes.

    Raises:
        PromptError: If there is no prompt.
        SiteError: If a layer does not exist.
        FitError: If there are too few prompts.
    """
    sites = [Site(layer) for layer in layers]
    x, y = (collect_last_token(model, prompts, sites) for model in (base, tuned))
    return {s.layer: cka_jackknife(x[s], y[s], debiased=debiased, within=within) for s in sites}
