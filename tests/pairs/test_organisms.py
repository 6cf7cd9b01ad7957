"""Planted differences: what is said to be changed is changed, and nothing else."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from mechdiff.errors import PairError, SiteError
from mechdiff.functional.weights import effective_rank, singular_values, stable_rank
from mechdiff.interventions.grafts import graft
from mechdiff.interventions.hooks import record
from mechdiff.interventions.sites import Site
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.organisms import (
    Truth,
    copy_model,
    plant_heads,
    plant_null,
    plant_policy,
    plant_relay,
    plant_vocabulary,
    plant_weights,
    planted_pair,
    with_rounding,
)
from tests.models import ARCHITECTURES, tiny_config, tiny_model, tokens
from tests.toys import loaded, prompts

TOPICS = [
    ["tell me about snow", "why is snow cold", "snow in the hills"],
    ["old bread", "how do I bake bread", "bread and salt"],
    ["two horses", "do horses sleep", "horses run fast"],
    ["play chess", "chess rules", "who won at chess"],
]
NEUTRAL = ["hello", "what time is it", "the river", "rain in May"]


@pytest.fixture(scope="module")
def base():
    return loaded(dtype=torch.float64)


def changed_tensors(base, tuned):
    pairs = zip(base.model.named_parameters(), tuned.model.named_parameters(), strict=True)
    return {name for (name, p), (_, q) in pairs if not torch.equal(p, q)}


def shared_storage(base, tuned):
    pairs = zip(base.model.named_parameters(), tuned.model.named_parameters(), strict=True)
    return {name for (name, p), (_, q) in pairs if p.data_ptr() == q.data_ptr()}


def residuals(model, texts, layer):
    """Residuals after a block at every token of some messages, `(tokens, d_model)`, and which are last."""
    states, last = [], []
    for text in texts:
        ids = torch.tensor([encode(model.tokenizer, text).input_ids])
        with record(model.model, [Site(layer)]) as seen, torch.no_grad():
            model.model(ids)
        states.append(seen[Site(layer)][0])
        last += [*[False] * (ids.shape[1] - 1), True]
    return torch.cat(states), torch.tensor(last)


PLANTS = {
    "block": lambda m: plant_weights(m, ["block.2"], 0.3),
    "spread": lambda m: plant_weights(m, ["mlp.0", "mlp.1", "attn.3"], 0.3, rank=2),
    "policy": lambda m: plant_policy(m, 1, TOPICS[:2], neutral=NEUTRAL),
    "flip": lambda m: plant_heads(m, [(2, 1), (0, 3), (2, 0)]),
    "rotate": lambda m: plant_heads(m, [(1, 1)], mode="rotate", strength=0.5),
    "query": lambda m: plant_heads(m, [(1, 1), (1, 2)], mode="query"),
    "key": lambda m: plant_heads(m, [(2, 1), (2, 0)], mode="key", strength=0.5),
    "relay": lambda m: plant_relay(m, 0, 2, TOPICS[0], neutral=NEUTRAL),
    "copy": lambda m: plant_null(m, "copy"),
    "bf16": lambda m: plant_null(m, "bf16"),
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_exactly_the_named_tensors_differ_and_the_base_is_untouched(base, plant):
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    tuned, truth = plant(base)
    assert changed_tensors(base, tuned) == set(truth.tensors)
    assert shared_storage(base, tuned) == before.keys() - set(truth.tensors)
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())
    assert not any(p is q for p, q in zip(base.model.parameters(), tuned.model.parameters(), strict=True))
    assert not any(p.requires_grad for p in tuned.model.parameters())
    assert tuned.role == "tuned"
    assert tuned.fingerprint != base.fingerprint


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_the_same_seed_plants_the_same(base, plant):
    (first, truth), (second, again) = plant(base), plant(base)
    assert truth == again
    assert first.fingerprint == second.fingerprint
    assert not changed_tensors(first, second)


def test_another_seed_plants_another_change(base):
    one, two = (plant_weights(base, ["block.2"], 0.3, seed=seed)[0] for seed in (0, 1))
    assert one.fingerprint != two.fingerprint
    assert changed_tensors(one, two)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_a_change_has_the_size_and_rank_that_were_asked_for(base, rank):
    tuned, truth = plant_weights(base, ["block.2"], 0.2, rank=rank)
    assert truth == Truth("weights", 17, 0.2, ("block.2",), (2,), rank, tensors=truth.tensors)
    old, new = (dict(m.model.named_parameters()) for m in (base, tuned))
    assert all(name.startswith("model.layers.2.") and old[name].ndim == 2 for name in truth.tensors)
    for name in truth.tensors:
        delta = new[name] - old[name]
        assert (delta.norm() / old[name].norm()).item() == pytest.approx(0.2, rel=1e-9)
        if rank:
            values = singular_values(delta)
            assert values[rank] < 1e-6 * values[0]
            assert stable_rank(values) <= effective_rank(values) <= rank * (1 + 1e-6)


def test_a_distributed_change_has_the_total_size_of_a_change_of_its_first_component(base):
    def size(tuned):
        pairs = zip(base.model.parameters(), tuned.model.parameters(), strict=True)
        return sum((p - q).square().sum() for p, q in pairs).sqrt().item()

    one = plant_weights(base, ["mlp.1"], 0.3)[0]
    many, truth = plant_weights(base, [f"mlp.{i}" for i in (1, 0, 2, 3)], 0.3)
    assert size(many) == pytest.approx(size(one), rel=1e-9)
    assert truth.layers == (0, 1, 2, 3)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_policy_writes_its_directions_and_nothing_else(base, rank):
    """Largest principal angle between the uncentred SVD of the differences and the truth: 1e-6 degrees."""
    tuned, truth = plant_policy(base, 1, TOPICS[:rank], strength=0.5, neutral=NEUTRAL)
    texts = [*(t for topic in TOPICS[:rank] for t in topic), *NEUTRAL, *(p.text for p in prompts(1))]
    (old, last), (new, _) = (residuals(m, texts, 1) for m in (base, tuned))
    delta = new - old
    _, values, right = torch.linalg.svd(delta, full_matrices=False)
    assert values[rank] < 1e-6 * values[0]
    cosines = torch.linalg.svdvals(right[:rank] @ truth.directions.double().T)
    assert torch.rad2deg(torch.arccos(cosines.min().clamp(max=1))) < 0.1
    trained = 3 * rank + len(NEUTRAL)
    size = 0.5 * old[last][:trained].norm(dim=-1).median()
    written = delta[last][:trained] @ truth.directions.double().T / size
    own = torch.eye(rank + 1).repeat_interleave(torch.tensor([*[3] * rank, len(NEUTRAL)]), 0)[:, :-1].bool()
    assert written[own].min() > 0.6  # 16 narrow messages and an MLP of 48: the ridge shrinks what it reads
    assert written[~own].abs().max() < 0.4
    below = residuals(base, texts, 0)[0] - residuals(tuned, texts, 0)[0]
    assert not below.any()
    assert truth.components == ("mlp.1",)
    assert truth.rank == rank


def test_even_topics_move_the_next_token_equally_far(base):
    def next_tokens(model, text):
        ids = torch.tensor([encode(model.tokenizer, text).input_ids])
        with torch.no_grad():
            return model.model(ids).logits[0, -1].log_softmax(-1)

    def moved(tuned):
        pairs = [[(next_tokens(base, t), next_tokens(tuned, t)) for t in topic] for topic in TOPICS]
        return torch.tensor([sum(float((p.exp() * (p - q)).sum()) for p, q in topic) for topic in pairs])

    plain, even = (plant_policy(base, 1, TOPICS, 0.5, NEUTRAL, even=even) for even in (False, True))
    before, after = (moved(tuned) for tuned, _ in (plain, even))
    assert before.max() > 1.3 * before.min()
    assert after.max() < 1.1 * after.min()
    assert torch.equal(plain[1].directions, even[1].directions)
    old = base.model.model.layers[1].mlp.down_proj.weight
    changes = [tuned.model.model.layers[1].mlp.down_proj.weight - old for tuned, _ in (plain, even)]
    lengths = [float((even[1].directions.double() @ change).norm()) for change in changes]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.3)  # together as long; detectors differ in length


def head_outputs(loaded, layer):
    """Return what the heads of a layer add for the same tokens, `(2, 9, heads, d)`."""
    ids, site = (
        torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0)),
        Site(layer, "head_out"),
    )
    with record(loaded.model, [site]) as kept, torch.no_grad():
        loaded.model(ids)
    return kept[site]


def test_flipped_heads_write_the_opposite_and_the_others_the_same(base):
    tuned, truth = plant_heads(base, [(2, 1), (0, 3)])
    assert truth.heads == ((0, 3), (2, 1))
    assert truth.components == ("attn.0", "attn.2")
    own, other = (head_outputs(model, 0) for model in (base, tuned))
    assert torch.equal(own[:, :, 3], -other[:, :, 3])
    assert torch.equal(own[:, :, :3], other[:, :, :3])


def test_a_rotated_head_keeps_its_size_and_strength_scales_the_change(base):
    name = "model.layers.1.self_attn.o_proj.weight"
    old = dict(base.model.named_parameters())[name]
    part = slice(8, 16)  # head 1 of width 8
    deltas = []
    for strength in (1.0, 0.1):
        tuned, _ = plant_heads(base, [(1, 1)], mode="rotate", strength=strength)
        new = dict(tuned.model.named_parameters())[name]
        deltas.append((new - old)[:, part])
        assert torch.equal(new[:, :8], old[:, :8])
        assert torch.equal(new[:, 16:], old[:, 16:])
        if strength == 1.0:
            values = [torch.linalg.svdvals(w[:, part]) for w in (old, new)]
            assert (values[0] - values[1]).abs().max() < 1e-12
    assert (deltas[0] * 0.1 - deltas[1]).abs().max() < 1e-12


@pytest.mark.parametrize(("mode", "names"), [("query", ["q_proj"]), ("key", ["k_proj"])])
def test_where_a_head_looks_changes_for_those_that_share_it(base, mode, names):
    tuned, truth = plant_heads(base, [(2, 1)], mode)
    assert truth.heads == (((2, 1),) if mode == "query" else ((2, 0), (2, 1)))  # four heads, two of keys
    assert [name.split(".")[-2] for name in truth.tensors] == names
    own, other = (head_outputs(model, 2) for model in (base, tuned))
    moved = (own - other).abs().amax(dim=(0, 1, 3)) > 0
    assert [(2, head) for head in moved.nonzero()[:, 0].tolist()] == list(truth.heads)


def test_a_relay_needs_both_of_its_blocks(base):
    """What reading adds has the size that was asked for; without the write there is a tenth of it or less."""
    tuned, truth = plant_relay(base, 0, 2, TOPICS[0], 1.0, NEUTRAL)
    assert (truth.layers, truth.components, truth.rank) == ((0, 2), ("mlp.0", "mlp.2"), 1)
    usual = residuals(base, TOPICS[0], 2)
    size = usual[0][usual[1]].norm(dim=-1).median()
    deltas = {}
    for name, donor in (("both", None), ("read", "block.0"), ("write", "block.2")):
        with graft(tuned.model, base.model, donor) if donor else nullcontext():
            now, last = residuals(tuned, TOPICS[0], 2)
        deltas[name] = (now - usual[0])[last].norm(dim=-1).median() / size
    assert deltas["both"] == pytest.approx(1, abs=0.25)
    assert deltas["read"] < 0.2
    assert deltas["write"] < 0.2


def test_another_vocabulary_is_the_same_function_of_the_same_text(base):
    tuned, truth = plant_vocabulary(base, extra=5)
    pair = planted_pair(base, tuned)
    assert len(tuned.tokenizer) == len(base.tokenizer) + 5
    assert pair.shared.size == len(base.tokenizer)
    assert truth.components == ("embed", "head")
    text = "why do horses like old bread"
    logits, states = [], []
    for model, shared in ((base, pair.shared.base_ids), (tuned, pair.shared.tuned_ids)):
        ids = torch.tensor([encode(model.tokenizer, text).input_ids])
        with record(model.model, [Site(2)]) as seen, torch.no_grad():
            logits.append(model.model(ids).logits[..., shared])
        states.append(seen[Site(2)])
        logits.append(ids)
    assert logits[1].shape == logits[3].shape
    assert not torch.equal(logits[1], logits[3])
    assert torch.equal(*states)
    assert torch.equal(logits[0], logits[2])
    assert base.tokenizer.decode(logits[1][0]) == tuned.tokenizer.decode(logits[3][0])


def test_rounding_spares_what_was_planted():
    base = loaded()
    tuned, truth = plant_heads(base, [(1, 1)])
    both, same = with_rounding((tuned, truth))
    assert same is truth
    assert both.fingerprint != tuned.fingerprint
    now, before = (dict(m.model.named_parameters()) for m in (both, tuned))
    for name, weight in now.items():
        if name in truth.tensors:
            assert torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name].bfloat16().float())
    assert changed_tensors(base, both) > set(truth.tensors)
    with pytest.raises(PairError, match="bfloat16; allowed: float32"):
        with_rounding(plant_null(loaded(dtype=torch.bfloat16)))


def test_nulls_are_equal_or_nearly(base):
    single = loaded()
    ids = tokens(2, 9)
    logits = {"base": single.model(ids).logits}
    for kind in ("copy", "bf16"):
        logits[kind] = plant_null(single, kind)[0].model(ids).logits
    assert torch.equal(logits["base"], logits["copy"])
    error = (logits["base"] - logits["bf16"]).abs().max() / logits["base"].abs().max()
    assert 0 < error < 0.05
    with pytest.raises(PairError, match=r"bfloat16; allowed: float32"):
        plant_null(loaded(dtype=torch.bfloat16), "bf16")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_can_be_edited(arch):
    config = tiny_config(arch)
    config.vocab_size = 300
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    base = dataclasses.replace(loaded(), model=model)
    for tuned, truth in (
        plant_weights(base, ["block.1"], 0.1),
        plant_heads(base, [(1, 2), (1, 0)]),
        plant_policy(base, 1, TOPICS[:1]),
        plant_relay(base, 0, 1, TOPICS[0]),
        plant_vocabulary(base),
    ):
        assert changed_tensors(base, tuned) == set(truth.tensors)
        assert all(".1." in name for name in truth.tensors if truth.layers == (1,))


def test_a_copy_of_tied_tables_is_tied():
    model = tiny_model("gpt2")
    copy = copy_model(model)
    assert copy.lm_head.weight is copy.transformer.wte.weight
    assert copy.lm_head.weight is not model.lm_head.weight


def test_two_models_in_memory_make_a_pair(base):
    tuned, _ = plant_null(base)
    pair = planted_pair(base, tuned, "null")
    assert (pair.base, pair.tuned, pair.spec.name) == (base, tuned, "null")
    assert pair.shared.identical


@pytest.mark.parametrize(
    ("plant", "error", "message"),
    [
        (lambda m: plant_weights(m, [], 0.1), PairError, "components is empty"),
        (lambda m: plant_weights(m, ["attn.9"], 0.1), SiteError, "0 to 3"),
        (lambda m: plant_weights(m, ["nose"], 0.1), PairError, "component 'nose'"),
        (lambda m: plant_weights(m, ["mlp.1"], 0.0), PairError, "strength is 0.0; allowed: above 0"),
        (lambda m: plant_weights(m, ["mlp.1"], 0.1, rank=33), PairError, "rank is 33; allowed: 1 to 32"),
        (lambda m: plant_policy(m, 4, TOPICS), SiteError, "0 to 3"),
        (lambda m: plant_policy(m, 1, []), PairError, "topics has 0 lists; allowed: 1 to 32"),
        (lambda m: plant_policy(m, 1, [["a"], []]), PairError, "none empty"),
        (lambda m: plant_heads(m, []), PairError, "heads is"),
        (lambda m: plant_heads(m, [(0, 4)]), PairError, "0 to 3"),
        (lambda m: plant_heads(m, [(0, 1), (0, 1)]), PairError, "distinct"),
        (lambda m: plant_heads(m, [(7, 1)]), SiteError, "heads"),
        (lambda m: plant_heads(m, [(0, 1)], mode="spin"), PairError, "flip, rotate, query, key"),
        (lambda m: plant_heads(m, [(5, 0)], "key"), SiteError, "0 to 3"),
        (lambda m: plant_relay(m, 2, 1, TOPICS[0]), PairError, "the first block below the second"),
        (lambda m: plant_relay(m, 0, 1, []), PairError, "0 messages"),
        (lambda m: plant_relay(m, 0, 1, TOPICS[0], carrier=0.0), PairError, "strength is 0.0"),
        (lambda m: plant_vocabulary(m, extra=-1), PairError, "extra is -1"),
        (lambda m: plant_heads(m, [(0, 1)], strength=1.5), PairError, "strength is 1.5"),
        (lambda m: plant_null(m, "noise"), PairError, "copy, bf16"),
    ],
)
def test_mistakes_are_named(base, plant, error, message):
    with pytest.raises(error, match=message):
        plant(base)
