"""Monitor as a callback: a planted class is read where it is written, and nowhere by shuffled labels."""

from dataclasses import replace

import pytest
import torch

from mechdiff.callbacks.monitor import Monitor
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.states import read_ends
from mechdiff.errors import ConfigError, PromptError
from mechdiff.functional.handles import auroc
from mechdiff.functional.probes import fit_probe
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.organisms import plant_policy, planted_pair
from tests.toys import SYSTEM, loaded, prompts

ALL = [replace(p, split="dev" if p.topic.endswith("s0") else "eval") for p in prompts(2)]  # 16 and 16
WRITTEN = 1


@pytest.fixture(scope="module")
def found():
    base = loaded()
    texts = {label: [p.text for p in ALL if p.label == label] for label in ("target", "neutral")}
    tuned, _ = plant_policy(base, WRITTEN, [texts["target"]], 8.0, texts["neutral"])
    callback = Monitor(stride=1, draws=10, tokens_per_batch=300)
    return callback, list(callback.evaluate(None, planted_pair(base, tuned), ALL))


def value(records, model, layer, lang="all", control="none"):
    (r,) = [
        r
        for r in records
        if (r.model, r.site, r.params["lang"], r.control) == (model, f"resid_post.{layer}", lang, control)
    ]
    return r


def test_a_class_is_read_where_it_is_written_and_not_below(found):
    _, records = found
    for lang in ("all", "en", "kk"):
        assert value(records, "base", 0, lang).value == value(records, "tuned", 0, lang).value
        written = value(records, "tuned", WRITTEN, lang)
        assert written.n == (16 if lang == "all" else 8)
        assert written.value == 1.0
        assert 0.3 < written.low < 1.0  # all apart, and still only so many prompts
    assert value(records, "base", 0).value < 1.0


def test_shuffled_labels_read_nothing(found):
    _, records = found
    middles = [r.value for r in records if r.control == "shuffled" and r.params["lang"] == "all"]
    assert len(middles) == 2 * 4
    assert 0.35 < sum(middles) / len(middles) < 0.65
    assert all(r.low <= r.value <= r.high for r in records)


def test_a_value_is_that_of_a_probe_fitted_by_hand_to_states_read_one_by_one(found):
    _, records = found
    base = loaded()
    side = Side(
        base, SuffixEngine(base.model), torch.arange(300), [encode(base.tokenizer, p.text) for p in ALL]
    )
    side.read([Site(2)])
    states = torch.stack([s[Site(2)][-1] for s in side.states])
    target = torch.tensor([p.label == "target" for p in ALL])
    dev = torch.tensor([p.split == "dev" for p in ALL])
    probe = fit_probe(states[dev & target], states[dev & ~target])
    assert value(records, "base", 2).value == pytest.approx(
        auroc(probe(states[~dev]), target[~dev]), abs=1e-6
    )


def test_items_and_keys(found):
    callback, records = found
    assert len({r.key for r in records}) == len(records) == 2 * 4 * 3 * 2
    assert len(callback.items) == 2 * 4 * 16
    assert {i.quantity for i in callback.items} == {"probe_score"}


@pytest.mark.parametrize("template", [None, SYSTEM])
def test_states_of_a_batch_are_those_of_single_prompts(template):
    model = loaded(template=template) if template else loaded()
    encoded = [encode(model.tokenizer, p.text) for p in ALL[::3]]
    side = Side(model, SuffixEngine(model.model), torch.arange(200), encoded)
    ends = read_ends(side, [Site(0), Site(3)], tokens_per_batch=120)
    side.read([Site(0), Site(3)])
    for site in (Site(0), Site(3)):
        alone = torch.stack([s[site][-1] for s in side.states])
        assert (ends.states[site] - alone).abs().max() < 1e-5
    assert (ends.log_p - torch.stack(side.log_p)).abs().max() < 1e-5


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="draws is 0"):
        Monitor(draws=0)
    pair = planted_pair(loaded(), loaded())
    few = [p for p in ALL if (p.split, p.label) != ("dev", "neutral")]
    with pytest.raises(PromptError, match="label 'neutral'"):
        list(Monitor().evaluate(None, pair, few))
