"""Handles of random tensors for tiny models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from mechdiff.functional.clt import AffineMap
from mechdiff.functional.edits import Known
from mechdiff.functional.steering import complete
from mechdiff.handles.files import ROLES, Handle, Manifest
from mechdiff.handles.identity import weights_hash
from tests.models import WIDTH


def handle(
    model: PreTrainedModel | None = None, kind: str = "add", k: int | None = None, **more: Any
) -> Handle:
    """Make a handle whose edit is about as large as a state."""
    draws = torch.Generator().manual_seed(3)
    k = k or (1 if kind == "add" else 3)
    d = more.get("width", WIDTH)
    weight = torch.eye(d) + 0.5 * torch.randn(d, d, generator=draws)
    delta, neutral, bias = 2 * torch.randn(3, d, generator=draws)
    known = Known(complete(torch.zeros(0, d), k), delta, neutral, AffineMap(weight, bias))
    settings = {"alpha": 1.0, "width": d, "fingerprint": "files", "provenance": {"pair": "tiny"}, **more}
    weights = "none" if model is None else weights_hash(model)
    manifest = Manifest("resid_post.1", kind, k, model=ROLES[kind], weights=weights, **settings)
    return Handle(manifest, known)
