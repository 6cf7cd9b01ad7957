"""No gap counts that rounding the weights of one model explains."""

from __future__ import annotations

import pytest
import torch

from mechdiff.callbacks.base import rounding_floor
from mechdiff.callbacks.grafts import Grafts
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.rounding import rounded, rounded_weights
from mechdiff.modules import Divergence
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.organisms import plant_null, plant_weights
from mechdiff.results import Results
from tests.callbacks.pairs import pair, prompts
from tests.toys import loaded


@pytest.fixture(scope="module")
def base():
    return loaded()


def test_rounded_weights_are_there_within_the_context_alone(base):
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    with rounded(base.model):
        assert all(torch.equal(w, before[n].bfloat16().float()) for n, w in base.model.named_parameters())
        assert not rounded_weights(base.model)
    assert all(torch.equal(w, before[n]) for n, w in base.model.named_parameters())
    assert rounded_weights(base.model).keys() <= before.keys()
    assert not rounded_weights(loaded(dtype=torch.bfloat16).model)


def test_the_floor_is_what_rounding_does_to_the_model_that_is_not_round(base):
    tuned, _ = plant_null(base, "bf16")
    texts = prompts()
    floors = [rounding_floor(pair(*both), texts) for both in ((base, tuned), (tuned, base), (base, base))]
    assert floors[0] == floors[1] == floors[2] > 0
    assert rounding_floor(pair(tuned, tuned), texts) == 0
    nats = []
    for prompt in texts[:8]:
        ids = torch.tensor([encode(base.tokenizer, prompt.text).input_ids])
        with torch.no_grad():
            ends = [m.model(ids).logits[0, -1].double().log_softmax(-1) for m in (base, tuned)]
        nats.append(float(kl_divergence(*ends)))
    assert 0.3 < floors[0] / (sum(nats) / len(nats)) < 3


@pytest.mark.parametrize(("rounding", "measured"), [(0.0, True), (1e-9, True), (1.0, False)])
def test_a_gap_must_exceed_what_rounding_explains(base, rounding, measured):
    tuned, _ = plant_weights(base, ["block.1"], 0.5)
    grafts = Grafts(("block",), lambdas=(), effect_prompts=0, ranks=False)
    both, texts = pair(base, tuned), prompts()
    grafts.connect(lambda: both, texts, 17)
    grafts.rounding = rounding
    with torch.no_grad():
        found = Results(grafts.evaluate(Divergence(["resid_post.1"]), both, texts))
    for r in found.select(quantity="graft_recovery"):
        assert (r.value is not None, r.reason) == (measured, None if measured else "gap_too_small")
