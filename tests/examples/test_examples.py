"""The examples for other libraries find our numbers there: rows of a store, and a handle's effect."""

from __future__ import annotations

import pytest
import torch

from examples.given import Given, given
from mechdiff import load_pair, load_prompts, steer
from mechdiff.data.prompts import select
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.handles.files import write
from mechdiff.study import read_pair
from tests.handles.make import handle
from tests.workspace import workspace

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Return what the examples start from, of a tiny pair."""
    folder = tmp_path_factory.mktemp("user")
    pair = workspace(folder)
    base = load_pair(read_pair(pair)).base
    texts = select(load_prompts(read_pair(pair).prompts), "fit")
    store = ensure_store(base, texts, [SITE], ExtractionSpec(str(folder / "stores")))
    path = write(folder / "handle.safetensors", handle(base.model, "mapped"))
    return given(str(pair), str(store.folder), str(path))


@torch.no_grad()
def check(start: Given, seen: torch.Tensor, plain: torch.Tensor, moved: torch.Tensor) -> None:
    """Compare states and logits of another library with ours."""
    torch.testing.assert_close(seen[start.positions], start.states, rtol=1e-4, atol=1e-5)
    clean = start.model(start.ids).logits[0, -1]
    torch.testing.assert_close(plain, clean, rtol=1e-4, atol=1e-5)
    with steer(start.model, start.handle):
        expected = start.model(start.ids).logits[0, -1]
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    assert (expected - clean).abs().max() > 1e-2


def test_in_nnsight(start: Given) -> None:
    pytest.importorskip("nnsight", reason="planned: nnsight is not installed")
    from examples.with_nnsight import states, steered

    seen = states(start.model, start.ids, start.handle.site.layer)
    moved = steered(start.model, start.ids, start.handle)
    check(start, seen, start.model(start.ids).logits[0, -1], moved)  # the trace leaves nothing behind


def test_in_transformer_lens(start: Given) -> None:
    pytest.importorskip("transformer_lens", reason="planned: transformer_lens is not installed")
    from examples.with_transformer_lens import bridge, states, steered

    bridged = bridge(start.model, start.tokenizer)
    seen = states(bridged, start.ids, start.handle.site.layer)
    check(start, seen, bridged(start.ids)[0, -1], steered(bridged, start.ids, start.handle))
