"""Heads exchanged exactly, base's weights on tuned's input, grafts of one head, and edges."""

import pytest
import torch

from mechdiff.errors import PairError, UsageError
from mechdiff.interventions.attended import run_block
from mechdiff.interventions.attribution import attribute
from mechdiff.interventions.grafts import graft
from mechdiff.interventions.head_edges import Edge, attribute_edges, edges_among
from mechdiff.interventions.head_grafts import group, head_graft
from mechdiff.interventions.head_patching import (
    adds_up,
    carried,
    exchange,
    head_changes,
    mean_baseline,
    own_change,
    patch_heads,
)
from mechdiff.interventions.head_runs import ZERO, Baseline, Batch, States, clean_states
from mechdiff.interventions.hooks import head_weights, intervene, record
from mechdiff.interventions.patching import head_patch_or_zero
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from tests.interventions.test_attribution import LAYERS, STEP, double, score
from tests.models import ARCHITECTURES, HEADS, WIDTH, tiny_config, tiny_model, tokens

EVERY = torch.ones(2, 7, dtype=torch.bool)
SEPARATE = ["llama", "qwen2", "qwen3", "gemma2"]


def models(arch: str = "llama", dtype: torch.dtype = torch.float32):
    return tuple(tiny_model(arch, LAYERS, seed, dtype) for seed in (0, 5))


def other(donor, ids: torch.Tensor) -> Baseline:
    states = clean_states(donor, Batch(ids))
    return Baseline(states.z, {layer: head_weights(donor, layer) for layer in states.z})


# Exact exchanges


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["zero", "model"])
def test_single_heads_are_exchanged_as_in_a_whole_run(arch, kind):
    model, donor = models(arch)
    batch = Batch(tokens(2, 7), where=EVERY)
    engine, states = SuffixEngine(model), clean_states(model, batch)
    baseline = ZERO if kind == "zero" else other(donor, batch.tokens)
    heads = [(layer, head) for head in range(HEADS) for layer in reversed(range(LAYERS))]
    found = patch_heads(engine, batch, states, heads, baseline)
    for (layer, head), logits in zip(heads, found, strict=True):
        swap = []
        if kind == "model":
            with record(donor, [site := Site(layer, "head_out")]) as kept:
                batch.run(donor)
            swap = ["swap", kept[site][:, :, head]]
        with torch.no_grad(), head_patch_or_zero(model, layer, head, *swap):
            assert (logits - batch.run(model)).abs().max() < 1e-5  # 6e-7


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_patching_heads_into_themselves_changes_nothing(arch):
    model, _ = models(arch)
    batch, engine = Batch(tokens(2, 7)), SuffixEngine(model)
    states = clean_states(model, batch)
    own = Baseline(states.z)
    for layer in range(LAYERS):
        found = patch_heads(engine, batch, states, [(layer, 0)], own)
        assert torch.equal(found[0], states.logits)  # 0
    picked = {layer: torch.ones(2, HEADS, dtype=torch.bool) for layer in range(LAYERS)}
    with torch.no_grad(), intervene(model, exchange(model, batch, picked, own)):
        assert (batch.run(model) - states.logits).abs().max() < 1e-5


def test_a_copied_pair_differs_nowhere():
    model, copy = tiny_model("llama", LAYERS), tiny_model("llama", LAYERS)
    batch, engine = Batch(tokens(2, 7)), SuffixEngine(model)
    states, theirs = clean_states(model, batch), other(copy, batch.tokens)
    assert own_change(engine, copy, batch, states).z == {}
    found = attribute(model, batch, score, {"other": theirs, "own": Baseline({})})
    assert not found.values["other"].any()
    assert not found.values["own"].any()
    for layer in range(LAYERS):
        assert torch.equal(patch_heads(engine, batch, states, [(layer, 1)], theirs)[0], states.logits)


def test_heads_exchanged_together_start_from_what_they_add_in_that_run():
    """With every head and every MLP of the donor, from the donor's embedding, it is the donor's residual."""
    model, donor = models()
    donor.model.norm.weight, donor.lm_head.weight = model.model.norm.weight, model.lm_head.weight
    donor.model.embed_tokens.weight = model.model.embed_tokens.weight
    batch = Batch(tokens(2, 7), where=EVERY)
    mlps = [Site(layer, "mlp_out") for layer in range(LAYERS)]
    with record(donor, mlps) as kept, torch.no_grad():
        wanted = batch.run(donor)
    picked = {layer: torch.ones(2, HEADS, dtype=torch.bool) for layer in range(LAYERS)}
    edits = exchange(model, batch, picked, other(donor, batch.tokens))
    edits |= {site: (lambda _value, _positions, site=site: kept[site]) for site in mlps}
    with torch.no_grad(), intervene(model, edits):
        assert (batch.run(model) - wanted).abs().max() < 1e-5


def test_rows_choose_their_own_heads():
    model, donor = models()
    ids = tokens(1, 7).repeat(3, 1)
    batch = Batch(ids)
    baseline = other(donor, ids)
    picked = torch.zeros(3, HEADS, dtype=torch.bool)
    picked[1, 2] = picked[2, 0] = True
    with torch.no_grad(), intervene(model, exchange(model, batch, {1: picked}, baseline)):
        found = batch.run(model)
    engine = SuffixEngine(model)
    single = Batch(ids[:1])
    states = clean_states(model, single)
    wanted = patch_heads(engine, single, states, [(1, 2), (1, 0)], other(donor, ids[:1]))[:, 0]
    assert (found[0] - states.logits[0]).abs().max() < 1e-5
    assert (found[1:] - wanted).abs().max() < 1e-5


def test_the_mean_and_a_run_that_is_carried_over():
    model, _ = models()
    batch = Batch(tokens(2, 7))
    states = clean_states(model, batch)
    mean = mean_baseline([(batch, states), (batch, states)])
    assert mean.z is not None
    assert (mean.z[1][0, 0] - states.z[1][:, 1:].flatten(0, 1).mean(0)).abs().max() < 1e-6
    row = carried({1: states.z[1][:1]}, torch.tensor([2, 4]), torch.tensor([1, 6]), 5)[1]
    assert torch.equal(row[0, [2, 4]], states.z[1][0, [1, 6]])
    assert not row[0, [0, 1, 3]].any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_norm_after_the_attention_is_noticed(arch):
    assert adds_up(tiny_model(arch, LAYERS), LAYERS - 1) == (arch != "gemma2")


# Own change


def flipped(arch: str, heads: list[tuple[int, int]]):
    tuned = tiny_model(arch, LAYERS)
    for layer, head in heads:
        head_weights(tuned, layer)[head].neg_()
    return tuned


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_heads_turned_round_are_the_only_ones_with_a_change_of_their_own(arch):
    heads = [(0, 1), (1, 3), (1, 0)]
    base, tuned = tiny_model(arch, LAYERS), flipped(arch, heads)
    batch = Batch(tokens(2, 7))
    states, engine = clean_states(tuned, batch), SuffixEngine(tuned)
    changed = own_change(engine, base, batch, states)
    for layer in range(LAYERS):
        sizes = head_changes(states.z[layer], head_weights(tuned, layer), changed, layer).norm(dim=-1)
        for head in range(HEADS):
            assert (sizes[..., head] > 0).all() if (layer, head) in heads else not sizes[..., head].any()
    found = attribute(tuned, batch, score, {"own": changed}).values["own"]
    assert {(at, h) for _, at, h in found.nonzero().tolist()} == set(heads)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_own_change_of_all_heads_is_the_graft_of_the_attention(arch):
    base, tuned = (tiny_model(arch, LAYERS, seed) for seed in (0, 5))
    batch = Batch(tokens(2, 7), where=EVERY)
    states, engine = clean_states(tuned, batch), SuffixEngine(tuned)
    changed = own_change(engine, base, batch, states)
    picked = {1: torch.ones(2, HEADS, dtype=torch.bool)}
    with torch.no_grad(), intervene(tuned, exchange(tuned, batch, picked, changed)):
        found = batch.run(tuned)
    with graft(tuned, base, "attn.1"), torch.no_grad():
        wanted = batch.run(tuned)
    if arch == "llama":  # no biases: those of the projection belong to no head
        assert (found - wanted).abs().max() < 1e-5
    else:
        assert (found - wanted).abs().max() > 1e-3


# Grafts


def test_a_graft_of_one_head_is_its_own_change_where_keys_are_not_shared():
    config = tiny_config("llama", LAYERS)
    config.num_key_value_heads = HEADS
    base, tuned = (type(tiny_model("llama", LAYERS))(config).eval().requires_grad_(False) for _ in range(2))
    batch = Batch(tokens(2, 7), where=EVERY)
    states, engine = clean_states(tuned, batch), SuffixEngine(tuned)
    changed = own_change(engine, base, batch, states)
    for head in range(HEADS):
        assert group(tuned, head) == [head]
        with head_graft(tuned, base, 1, head), torch.no_grad():
            wanted = batch.run(tuned)
        found = patch_heads(engine, batch, states, [(1, head)], changed)[0]
        assert (found - wanted).abs().max() < 1e-6
        assert (wanted - states.logits).abs().max() > 1e-4


@pytest.mark.parametrize("arch", SEPARATE)
def test_grafts_of_all_heads_of_a_layer_are_that_of_its_attention(arch):
    base, tuned = models(arch)
    ids = tokens(2, 7)
    for model in (base, tuned):  # what belongs to no head
        for name, tensor in model.named_parameters():
            if "_norm" in name or name.endswith("o_proj.bias"):
                tensor.fill_(0.5)
    kept = {n: p.data_ptr() for n, p in tuned.named_parameters()}
    with graft(tuned, base, "attn.1"), torch.no_grad():
        wanted = Batch(ids).run(tuned)
    contexts = [head_graft(tuned, base, 1, head) for head in range(HEADS)]
    for context in contexts:
        context.__enter__()
    with torch.no_grad():
        assert torch.equal(Batch(ids).run(tuned), wanted)  # 0
    for context in reversed(contexts):
        context.__exit__(None, None, None)
    assert kept == {n: p.data_ptr() for n, p in tuned.named_parameters()}


def test_a_graft_names_the_heads_that_share_its_keys():
    model = tiny_model("llama", 1)
    assert [group(model, head) for head in range(HEADS)] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_graft_of_an_equal_head_changes_nothing():
    base, tuned = tiny_model("llama", LAYERS), flipped("llama", [(1, 3)])
    ids = tokens(2, 7)
    clean = [Batch(ids).run(model) for model in (base, tuned)]
    with head_graft(tuned, base, 1, 0):
        assert torch.equal(Batch(ids).run(tuned), clean[1])
    with head_graft(tuned, base, 1, 3):
        assert torch.equal(Batch(ids).run(tuned), clean[0])


def test_grafts_that_cannot_be_are_refused():
    packed = tiny_model("gpt2", 1)
    with (
        pytest.raises(PairError, match="has no q_proj; allowed for a graft of one head"),
        head_graft(packed, packed, 0, 0),
    ):
        pass
    model = tiny_model("llama", 1)
    with (
        pytest.raises(UsageError, match="head 4 is out of range; allowed: 0 to 3"),
        head_graft(model, model, 0, HEADS),
    ):
        pass
    with (
        pytest.raises(PairError, match="allowed: equal shapes"),
        head_graft(model, tiny_model("qwen3", 1), 0, 0),
    ):
        pass


# Edges


@pytest.fixture
def softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))


def through(
    engine: SuffixEngine, batch: Batch, states: States, edge: Edge, move: torch.Tensor
) -> torch.Tensor:
    """Return the score with a receiver's input, and nothing else, moved."""
    model = engine.model
    if edge.receiver is None:
        site = Site(LAYERS - 1)
        with intervene(model, {site: lambda value, _positions: value + move}):
            return score(batch.run(model))
    layer, head = edge.receiver
    site = Site(layer, "head_z")
    with record(model, [site]) as seen:
        run_block(engine, layer, states.hidden[layer] + move, batch.tokens)

    def edit(z: torch.Tensor, _positions: torch.Tensor) -> torch.Tensor:
        return torch.cat([z[:, :, :head], seen[site][:, :, head : head + 1], z[:, :, head + 1 :]], 2)

    with intervene(model, {site: edit}):
        return score(batch.run(model))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_every_edge_is_the_central_difference(arch, softmax):
    model, batch = double(arch), Batch(tokens(2, 7))
    engine, states = SuffixEngine(model), clean_states(model, batch)
    heads = [(0, 1), (1, 0), (1, 3), (2, 2)]
    found = attribute_edges(engine, batch, score, heads, {"zero": ZERO}, states)["zero"]
    edges = edges_among(heads)
    assert found.shape == (2, len(edges)) == (2, 3 + 1 + 2 * 2 + 1)
    for column, edge in enumerate(edges):
        layer, head = edge.sender
        own = states.z[layer][:, :, head] @ head_weights(model, layer)[head] * batch.counted[..., None]
        with torch.no_grad():
            ends = [through(engine, batch, states, edge, sign * STEP * own) for sign in (1, -1)]
        wanted = (ends[0] - ends[1]) / (2 * STEP)
        assert (found[:, column] - wanted).abs().max() < 1e-7 * found.abs().max()


def test_the_edges_of_the_last_layer_to_the_logits_are_all_that_its_heads_do():
    """Behind the last attention there is the last MLP as well, which reads the heads: without it."""
    model, batch = double("gpt2"), Batch(tokens(2, 7))
    model.transformer.h[-1].mlp.c_proj.weight.zero_()
    heads = [(LAYERS - 1, head) for head in range(HEADS)]
    states = clean_states(model, batch)
    found = attribute_edges(SuffixEngine(model), batch, score, heads, {"zero": ZERO}, states)["zero"]
    whole = attribute(model, batch, score, {"zero": ZERO}).values["zero"][:, -1]
    assert (found - whole).abs().max() < 1e-12


def test_an_edge_needs_a_later_receiver():
    assert edges_among([(1, 0), (0, 1)]) == [Edge((0, 1), (1, 0)), Edge((0, 1), None), Edge((1, 0), None)]
    assert edges_among([(1, 0), (1, 1)]) == [Edge((1, 0), None), Edge((1, 1), None)]


def test_blocks_can_run_alone():
    model = tiny_model("llama", LAYERS)
    batch, engine = Batch(tokens(2, 7)), SuffixEngine(model)
    states = clean_states(model, batch)
    for layer in range(LAYERS):
        with record(model, [site := Site(layer, "head_z")]) as seen, torch.no_grad():
            run_block(engine, layer, states.hidden.get(layer), batch.tokens)
        assert torch.equal(seen[site], states.z[layer])
    with pytest.raises(UsageError, match="no input for block 1"):
        run_block(engine, 1, None, batch.tokens)
    assert states.hidden[1].shape == (2, 7, WIDTH)
