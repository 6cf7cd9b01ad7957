"""Grafts as a callback: planted changes are found, equal weights read 0, numbers are the plain ones."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mechdiff.callbacks.graded import read_openings, refusing
from mechdiff.callbacks.grafts import Grafts
from mechdiff.data.prompts import spread
from mechdiff.errors import ConfigError, PairError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.grafts import graft
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.fairness import restrict_logits
from mechdiff.pairs.organisms import plant_heads, plant_null, plant_policy, plant_weights, planted_pair
from mechdiff.results import QUANTITIES
from tests.toys import OTHER_END, loaded, prompts
from tests.workspace import OPENINGS

NEW = ["graft_kl", "weight_change", "weight_share", "weight_rank", "interpolation_kl", "interpolation_effect"]
PROMPTS = prompts(1)  # 16, in two languages


@pytest.fixture(autouse=True)
def _quantities(monkeypatch):
    monkeypatch.setitem(QUANTITIES, "rq1", QUANTITIES["rq1"] | set(NEW))


@pytest.fixture(scope="module")
def base():
    return loaded()


def run(base, tuned, callback=None, least=1.0, openings=None):
    callback = callback or Grafts(lambdas=(), ranks=False)
    pair = planted_pair(base, tuned)
    pair.spec.min_shared_coverage, pair.spec.openings = least, openings
    with torch.no_grad():
        return list(callback.evaluate(None, pair, PROMPTS))


def column(records, quantity, direction="base_into_tuned", control="none"):
    return {
        r.params["component"]: r.value
        for r in records
        if (r.quantity, r.params.get("direction"), r.control) == (quantity, direction, control)
    }


def log_p(model, ids):
    """Run every prompt on its own, the whole model, and restrict to shared tokens: the plain way."""
    rows = [torch.tensor([encode(model.tokenizer, p.text).input_ids]) for p in PROMPTS]
    with torch.no_grad():
        return torch.cat([restrict_logits(model.model(row).logits[:, -1], ids) for row in rows])


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_change_of_one_block_is_found_and_everything_else_reads_exactly_zero(base, layer):
    tuned, _ = plant_weights(base, [f"block.{layer}"], 0.5)
    records = run(base, tuned)
    inside = {f"{kind}.{layer}" for kind in ("block", "attn", "mlp")}
    for direction in ("base_into_tuned", "tuned_into_base"):
        found = column(records, "graft_recovery", direction)
        assert found[f"block.{layer}"] == found["all"] == 1.0
        assert all(value == 0.0 for name, value in found.items() if name not in inside | {"all"})
        assert len(found) == 3 + 3 * 4 + 1
        assert 0 < max(found[f"attn.{layer}"], found[f"mlp.{layer}"]) < 1
        shuffled = column(records, "graft_recovery", direction, control="random")
        assert set(shuffled) == {f"block.{layer}"}
        assert shuffled[f"block.{layer}"] < 0.3


def test_a_policy_and_chosen_heads_are_found_in_their_part_of_the_block(base):
    texts = [[p.text for p in PROMPTS if p.label == "target"]]
    for plant, part, other in (
        (plant_policy(base, 1, texts, 2.0), "mlp.1", "attn.1"),
        (plant_heads(base, [(1, 0), (1, 3)]), "attn.1", "mlp.1"),
    ):
        found = column(run(base, plant[0]), "graft_recovery")
        assert found[part] == found["block.1"] == 1.0
        assert found[other] == found["block.0"] == 0.0


def test_every_component_gives_what_whole_runs_of_single_prompts_give(base):
    """All weights differ. Largest difference of a mean KL of order 1: 1e-7."""
    tuned = loaded(seed=1)
    kinds = ("embed", "attn", "mlp", "norm", "head", "all")
    records = run(base, tuned, Grafts(kinds=kinds, lambdas=(), ranks=False, tokens_per_batch=150))
    ids = torch.arange(300)
    for recipient, donor, direction in (
        (tuned, base, "base_into_tuned"),
        (base, tuned, "tuned_into_base"),
    ):
        reference, values = log_p(donor, ids), column(records, "graft_kl", direction)
        recoveries = column(records, "graft_recovery", direction)
        gap = kl_divergence(reference, log_p(recipient, ids)).mean()
        assert values["none"] == pytest.approx(gap.item(), rel=1e-5)
        for name in recoveries:
            with graft(recipient.model, donor.model, name):
                left = kl_divergence(reference, log_p(recipient, ids)).mean()
            assert values[name] == pytest.approx(left.item(), rel=1e-5, abs=1e-9)
            assert recoveries[name] == pytest.approx(1 - (left / gap).item(), rel=1e-4, abs=1e-5)
        assert recoveries["all"] == 1.0


def test_records_carry_sites_intervals_and_items(base):
    tuned, _ = plant_weights(base, ["mlp.2"], 0.5)
    callback = Grafts(kinds=("block", "mlp"), max_prompts=8, lambdas=())
    records = run(base, tuned, callback)
    recoveries = [r for r in records if r.quantity == "graft_recovery"]
    assert {r.site for r in recoveries} == {None, *(f"resid_post.{i}" for i in range(4))}
    assert all((r.site is None) == r.params["component"].startswith("mlp") for r in recoveries)
    assert {(r.question, r.split, r.positions, r.unit, r.n) for r in recoveries} == {
        ("rq1", "eval", "last", "fraction", 8)
    }
    assert all(r.low <= r.value <= r.high for r in records if r.low is not None)
    assert len({r.key for r in records}) == len(records)
    arms = {(i.arm, i.direction) for i in callback.items}
    assert len(callback.items) == 8 * len(arms) == 8 * 2 * 10
    assert run(base, tuned, Grafts(kinds=("block", "mlp"), max_prompts=8, lambdas=())) == records


@pytest.mark.parametrize("kind", ["copy", "bf16"])
def test_a_null_has_no_gap_to_divide_by_and_says_so(base, kind):
    records = run(base, plant_null(base, kind)[0], Grafts(kinds=("block", "all"), lambdas=(0.5,)))
    recoveries = [r for r in records if r.quantity == "graft_recovery"]
    kls = [r.value for r in records if r.quantity in ("graft_kl", "interpolation_kl")]
    if kind == "copy":
        assert {(r.value, r.reason) for r in recoveries} == {(None, "gap_too_small")}
        assert set(kls) == {0.0}
        assert {r.value for r in records if r.quantity.startswith("weight")} == {0.0}
    else:  # rounding has an effect, and it is small
        assert 0 <= max(kls) < 1e-3


def test_weights_say_where_the_change_is_and_how_wide(base):
    tuned, truth = plant_weights(base, ["attn.1", "mlp.3"], 0.2, rank=2)
    records = [r for r in run(base, tuned, Grafts(kinds=(), lambdas=())) if r.quantity.startswith("weight")]
    share = {r.params["tensor"]: r.value for r in records if r.quantity == "weight_share"}
    change = {r.params["tensor"]: r.value for r in records if r.quantity == "weight_change"}
    assert share.keys() == change.keys() == base.model.state_dict().keys()
    assert sum(share.values()) == pytest.approx(1)
    assert {name for name, value in share.items() if value} == set(truth.tensors)
    assert {name for name, value in change.items() if value} == set(truth.tensors)
    ranks = [r for r in records if r.quantity == "weight_rank"]
    assert {(r.params["tensor"], r.params["kind"]) for r in ranks} == {
        (name, kind) for name in truth.tensors for kind in ("stable", "effective")
    }
    assert all(1 <= r.value < 2.01 for r in ranks if r.params["kind"] == "stable")
    owners = {r.params["tensor"]: (r.params["component"], r.site) for r in records}
    assert owners["model.layers.3.mlp.up_proj.weight"] == ("mlp.3", "resid_post.3")
    assert owners["model.layers.3.input_layernorm.weight"] == ("block.3", "resid_post.3")
    assert owners["model.norm.weight"] == ("norm", None)
    none = run(base, tuned, Grafts(kinds=(), lambdas=(), ranks=False))
    assert not [r for r in none if r.quantity == "weight_rank"]


def test_the_line_from_base_to_tuned_begins_and_ends_at_the_models(base, tmp_path):
    tuned = loaded(seed=1)
    openings = tmp_path / "openings.jsonl"
    rows = [{"lang": "en", "kind": kind, "text": text} for kind, text in OPENINGS]
    openings.write_text("\n".join(map(json.dumps, rows)))
    records = run(base, tuned, Grafts(kinds=(), effect_prompts=4), openings=openings)
    for role, zero in (("base", 0.0), ("tuned", 1.0)):
        line = {
            r.params["lambda_"]: r.value
            for r in records
            if r.quantity == "interpolation_kl" and r.params["reference"] == role
        }
        assert list(line) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
        assert line[zero] == 0.0
        assert min(value for point, value in line.items() if point != zero) > 0
    effects = [r for r in records if r.quantity == "interpolation_effect"]
    english = [p for p in PROMPTS if p.lang == "en"]
    graded = refusing(read_openings(openings)["en"])
    for model, point in ((base, 0.0), (tuned, 1.0)):
        for label in ("target", "neutral"):
            chosen = [p for p in spread(english, 4) if p.label == label]
            wanted = []
            for p in chosen:
                before = encode(model.tokenizer, p.text).input_ids
                nats = []
                for text in graded.texts:
                    ids = model.tokenizer(text, add_special_tokens=False).input_ids
                    logits = model.model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
                    nats.append(logits.double().log_softmax(-1)[range(len(ids)), ids].sum())
                wanted.append(graded(torch.stack(nats)).item())
            (found,) = [r for r in effects if (r.params["lambda_"], r.params["label"]) == (point, label)]
            assert found.value == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
            assert found.n == len(chosen)


def test_two_vocabularies_and_templates_are_compared_on_shared_tokens(base):
    tuned = loaded(size=330, template=OTHER_END, seed=1)
    records = run(base, tuned, Grafts(kinds=("all", "embed", "block"), lambdas=(0.0, 1.0)), least=0.0)
    pair = planted_pair(base, tuned)
    reference = log_p(base, pair.shared.base_ids)
    gap = kl_divergence(reference, log_p(tuned, pair.shared.tuned_ids)).mean().item()
    assert column(records, "graft_kl")["none"] == pytest.approx(gap, rel=1e-5)
    rows = (pair.shared.tuned_ids, pair.shared.base_ids)
    with graft(tuned.model, base.model, "embed", rows):
        left = kl_divergence(reference, log_p(tuned, pair.shared.tuned_ids)).mean().item()
    assert column(records, "graft_kl")["embed"] == pytest.approx(left, rel=1e-5)
    partial = {r.params["component"] for r in records if "shared_rows" in r.flags}
    assert partial == {"all", "embed"}
    assert column(records, "graft_recovery")["all"] < 1  # the tokens still differ
    line = {(r.params["lambda_"], r.params["reference"]): r.value for r in records if "lambda_" in r.params}
    assert line[1.0, "tuned"] == 0.0
    assert line[0.0, "base"] > 0


def test_tokens_may_have_other_ids_in_each_model(base):
    """Base has the larger table and counts from its other end: its ids are none of tuned's rows."""
    larger = loaded(size=330, seed=1)
    turned = json.loads(larger.tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in turned["added_tokens"]}
    places = sorted(set(turned["model"]["vocab"].values()) - special)
    other = dict(zip(places, reversed(places), strict=True))
    turned["model"]["vocab"] = {t: other.get(i, i) for t, i in turned["model"]["vocab"].items()}
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(turned)), eos_token="<|end|>", pad_token="<|end|>"
    )
    tokens.chat_template = larger.tokenizer.chat_template
    larger = dataclasses.replace(larger, tokenizer=tokens)
    shared = planted_pair(larger, base).shared
    assert int(shared.base_ids.max()) >= len(base.model.get_input_embeddings().weight)
    records = run(larger, base, Grafts(kinds=("all", "embed"), lambdas=()), least=0.0)
    with graft(base.model, larger.model, "embed", (shared.tuned_ids, shared.base_ids)):
        left = kl_divergence(log_p(larger, shared.base_ids), log_p(base, shared.tuned_ids)).mean().item()
    assert column(records, "graft_kl")["embed"] == pytest.approx(left, rel=1e-5)


def test_mistakes_are_named(base):
    with pytest.raises(ConfigError, match=r"kinds has 'heads'; allowed: all, embed"):
        Grafts(kinds=("block", "heads"))
    tuned = loaded(seed=1)
    tuned.model.lm_head = torch.nn.Linear(32, 300, bias=True)
    with pytest.raises(PairError, match=r"lm_head.bias is in one model only"):
        run(base, tuned)
