"""A pair with a policy per language planted at one block, subspaces fitted to its states, and the states."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.patcher import Side
from mechdiff.data.prompts import Prompt
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.steering import SteeringSubspace
from mechdiff.modules.steering_fit import Rows, fit
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.pairs.organisms import plant_policy, planted_pair
from mechdiff.results import Results
from tests.toys import loaded, prompts
from tests.workspace import OPENINGS

BLOCK = 1
SITES = [f"resid_post.{BLOCK}", "resid_post.2"]
ALL = prompts(2)  # 32, in two languages


@lru_cache
def policy(strength: float = 2.0) -> tuple[LoadedModel, LoadedModel, Tensor]:
    """Return base, tuned, and the two directions that it writes, Kazakh first."""
    base = loaded()
    topics = [[p.text for p in ALL if p.label == "target" and p.lang == lang] for lang in ("kk", "en")]
    tuned, truth = plant_policy(base, BLOCK, topics, strength, [p.text for p in ALL if p.label == "neutral"])
    assert truth.directions is not None
    return base, tuned, truth.directions


def pair_of(base: LoadedModel, tuned: LoadedModel, folder: Path | None = None) -> LoadedPair:
    """Make a pair in memory, with openings if there is a folder for them."""
    pair = planted_pair(base, tuned)
    if folder is not None:
        rows = [{"lang": lang, "kind": k, "text": t} for lang in ("en", "kk") for k, t in OPENINGS]
        path = folder / "openings.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        pair.spec.openings = str(path)
    return pair


def texts(*splits: str) -> list[Prompt]:
    """Return the same prompts once for every split."""
    return [replace(p, id=f"{split}-{p.id}", split=split) for split in splits for p in ALL]


def ends(model: LoadedModel) -> dict[str, Tensor]:
    """Return the states of all prompts at the last position, `(prompts, d)` by site."""
    encoded = [encode(model.tokenizer, p.text) for p in ALL]
    side = Side(model, SuffixEngine(model.model), torch.arange(300), encoded)
    side.read([Site.parse(site) for site in SITES])
    return {site: torch.stack([s[Site.parse(site)][-1] for s in side.states]) for site in SITES}


def stored(base: LoadedModel, tuned: LoadedModel) -> Any:
    """Stand for the data of a fit: every prompt is in every split."""
    rows = torch.arange(len(ALL))
    sides = {"source": ends(base), "target": ends(tuned)}

    def read(index: Tensor) -> dict[str, Any]:
        batch: dict[str, Any] = {k: {s: x[index] for s, x in side.items()} for k, side in sides.items()}
        return {**batch, "prompt": index}

    return SimpleNamespace(
        rows=lambda split, positions: rows, read=read, prompts=ALL, sites=SITES, source_sites=SITES
    )


def subspaces(base: LoadedModel, tuned: LoadedModel, k: int = 2, **more: Any) -> SteeringSubspace:
    """Fit subspaces to the states of all prompts."""
    module = SteeringSubspace(SITES, d_source=32, d_target=32, k=k, **more)
    target = torch.tensor([p.label == "target" for p in ALL])
    a, b = ends(base), ends(tuned)
    for index, site in enumerate(SITES):
        rows = Rows(a[site], b[site], target, torch.arange(len(ALL)))
        module.fill(index, fit(rows, rows, module.recipe))
    return module


def measure(callback: Any, module: Any, pair: LoadedPair, items: list[Prompt]) -> Results:
    """Run an evaluation on its splits."""
    callback.connect(lambda: pair, items, 17)
    with torch.no_grad():
        return Results(callback.evaluate(module, pair, [p for p in items if p.split in callback.splits]))
