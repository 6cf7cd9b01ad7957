"""Last residuals without a store are those of a plain forward."""

import pytest
import torch

from mechdiff.errors import PromptError, SiteError
from mechdiff.extraction.collect import collect_last_token_resids
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


def test_mistakes_are_named():
    model = loaded()
    with pytest.raises(PromptError, match="at least one message"):
        collect_last_token_resids(model, [], 1)
    with pytest.raises(SiteError):
        collect_last_token_resids(model, ["x"], 9)
