"""Pairs of tiny models and maps with known weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mechdiff.callbacks import MappedPatch
from mechdiff.data.prompts import Prompt
from mechdiff.modules import CLTMap
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.pairs.spec import PairSpec
from mechdiff.results import Record
from tests import toys

SITES = ("resid_post.0", "resid_post.2")


def pair(base: LoadedModel, tuned: LoadedModel, **spec: object) -> LoadedPair:
    """Make a pair of models that are there already."""
    made = LoadedPair(PairSpec(name="toy", **{"min_shared_coverage": 0.0, **spec}))
    made.__dict__.update(base=base, tuned=tuned)
    return made


def maps(
    kind: str = "identity",
    sites: Sequence[str] = SITES,
    sources: Sequence[str] | None = None,
    **options: object,
) -> CLTMap:
    """Make maps that are the identity, or random."""
    module = CLTMap(sites, sources, d_source=32, d_target=32, **options)
    draws = torch.Generator().manual_seed(5)
    for name in ("mapped", "shuffled"):
        weight, bias = getattr(module, f"{name}_weight"), getattr(module, f"{name}_bias")
        weight += torch.eye(32)
        if kind == "random":
            weight += 0.1 * torch.randn(weight.shape, generator=draws)
            bias += 0.1 * torch.randn(bias.shape, generator=draws)
    if kind == "random":
        module.shift += 0.1 * torch.randn(module.shift.shape, generator=draws)
    module.chosen.zero_()
    return module


def prompts(families: int = 1) -> list[Prompt]:
    """Return evaluation prompts in two languages and classes."""
    return [Prompt(**{**vars(p), "split": "eval"}) for p in toys.prompts(families)]


def evaluate(
    callback: MappedPatch, module: CLTMap, both: LoadedPair, texts: Sequence[Prompt]
) -> list[Record]:
    """Run an evaluation as it runs after a test."""
    callback.connect(lambda: both, texts, 17)
    with torch.no_grad():
        return list(callback.evaluate(module, both, texts))
