"""Last residuals without a store are those of a plain forward."""

import pytest
import torch

from mechdiff.errors import PromptError, SiteError
from mechdiff.extraction.collect import cka_by_layer, collect_last_token_resids
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.functional.cka import cka_jackknife
from mechdiff.interventions.sites import Site
from mechdiff.pairs.alignment import encode
from tests.toys import loaded, prompts


@pytest.mark.parametrize("layer", [0, 2])
def test_they_are_the_inputs_of_the_next_block(layer):
    model = loaded()
    texts = [p.text for p in prompts(1)[:3]]
    found = collect_last_token_resids(model, texts, layer)
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([encode(model.tokenizer, text).input_ids])
        states = model.model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(row, states[layer + 1][0, -1])


def test_likeness_without_a_store_is_that_of_a_store(tmp_path):
    base, tuned, texts = loaded(), loaded(seed=1), prompts(2)
    spec = ExtractionSpec(root=str(tmp_path), positions="last")
    quiet = {"enable_progress_bar": False}
    stores = [ensure_store(m, texts, ["resid_post.1"], spec, trainer_kwargs=quiet) for m in (base, tuned)]
    x, y = (s.read(Site(1), s.rows.example.argsort()) for s in stores)
    classes = [f"{p.lang}/{p.label}" for p in texts]
    for options in ({}, {"debiased": False}, {"within": classes}):
        found = cka_by_layer(base, tuned, [p.text for p in texts], [1, 3], **options)
        assert set(found) == {1, 3}
        assert found[1] == pytest.approx(cka_jackknife(x, y, **options), abs=1e-6)


def test_mistakes_are_named():
    model = loaded()
    with pytest.raises(PromptError, match="at least one message"):
        collect_last_token_resids(model, [], 1)
    with pytest.raises(SiteError):
        collect_last_token_resids(model, ["x"], 9)
