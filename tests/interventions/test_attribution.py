"""Attribution of heads: central differences, integrated gradients, baselines, and mistakes."""

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from torch import nn

from mechdiff.errors import UsageError
from mechdiff.interventions import attribution
from mechdiff.interventions.attention import head_layers
from mechdiff.interventions.attribution import attribute, grad_x_act, integrated_gradients
from mechdiff.interventions.head_runs import ZERO, Baseline, Batch, clean_states, run_attended
from mechdiff.interventions.hooks import head_weights, intervene
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from tests.models import ARCHITECTURES, HEADS, keep_double, tiny_model, tokens

LAYERS = 3
STEP = 1e-5


@pytest.fixture(autouse=True)
def softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a softmax written out (eager attention) stay in float64 as well."""
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))


def double(arch: str = "llama", seed: int = 0):
    return keep_double(tiny_model(arch, LAYERS, seed, torch.float64))


def score(logits: torch.Tensor) -> torch.Tensor:
    """Return a difference of logits for each row."""
    return logits[..., 3] - logits[..., 5]


def other_run(model, seed: int = 1, rows: int = 2, length: int = 7) -> Baseline:
    return Baseline(clean_states(model, Batch(tokens(rows, length, seed))).z)


def difference(model, batch: Batch, baseline: Baseline, layer: int, head: int) -> torch.Tensor:
    """Return the derivative of the score as a head goes from its own contribution to the baseline's."""
    own = clean_states(model, batch).z[layer][:, :, head]
    aim = torch.zeros_like(own) if baseline.z is None else baseline.z[layer][:, :, head]
    weights = head_weights(model, layer)
    theirs = baseline.weights.get(layer, weights)
    move = (own @ weights[head] - aim @ theirs[head]) * batch.counted[..., None]
    found = []
    for sign in (1, -1):

        def edit(output, _positions, sign=sign):
            return output + sign * STEP * move

        with torch.no_grad(), intervene(model, {Site(layer, "attn_out"): edit}):
            found.append(score(batch.run(model)))
    return (found[0] - found[1]) / (2 * STEP)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["zero", "run", "model"])
def test_every_attribution_is_the_central_difference(arch, kind):
    model, batch = double(arch), Batch(tokens(2, 7))
    donor = double(arch, seed=5)
    baseline = {"zero": ZERO, "run": other_run(model)}.get(kind) or Baseline(
        other_run(donor, 0).z, {layer: head_weights(donor, layer) for layer in range(LAYERS)}
    )
    found = attribute(model, batch, score, {"it": baseline})
    assert found.layers == list(range(LAYERS))
    largest = found.values["it"].abs().max()
    for layer in range(LAYERS):
        for head in range(HEADS):
            wanted = difference(model, batch, baseline, layer, head)
            assert (found.values["it"][:, layer, head] - wanted).abs().max() < 1e-7 * largest  # 6e-9


def test_with_grouped_queries_every_query_head_has_its_own_number():
    model, batch = double(), Batch(tokens(1, 7))
    assert model.config.num_key_value_heads < HEADS
    assert len(set(grad_x_act(model, batch, score)[0, 1].tolist())) == HEADS


def test_a_linear_number_is_attributed_completely():
    model, batch = double("gpt2"), Batch(tokens(2, 7), where=torch.ones(2, 7, dtype=torch.bool))
    torch.nn.init.normal_(model.transformer.ln_f.weight)
    model.transformer.ln_f = nn.Identity()
    model.transformer.h[
        -1
    ].mlp.c_proj.weight.zero_()  # what the last attention adds reaches the logits as it is
    last = LAYERS - 1
    found = grad_x_act(model, batch, score)[:, last].sum(1)
    clean = score(batch.run(model))
    with intervene(model, {Site(last, "head_z"): lambda z, _positions: torch.zeros_like(z)}):
        assert (found - (clean - score(batch.run(model)))).abs().max() < 1e-13  # 2e-15


def test_several_baselines_share_a_pass_and_rows_keep_apart():
    model, ids = double(), tokens(2, 7)
    baseline = other_run(model)
    both = attribute(model, Batch(ids), score, {"zero": ZERO, "run": baseline})
    assert torch.equal(both.values["zero"], grad_x_act(model, Batch(ids), score))
    row = Baseline({layer: z[1:] for layer, z in baseline.z.items()})
    alone = attribute(model, Batch(ids[1:]), score, {"run": row})
    assert (both.values["run"][1] - alone.values["run"][0]).abs().max() < 1e-12
    assert (both.scores[1] - alone.scores[0]).abs() < 1e-12


def test_swapping_a_run_and_its_counterfactual_flips_the_sign_where_the_number_is_linear():
    model = double("gpt2")
    model.transformer.ln_f, last = nn.Identity(), LAYERS - 1
    model.transformer.h[-1].mlp.c_proj.weight.zero_()
    runs = [Batch(tokens(1, 7, seed)) for seed in (0, 1)]
    found = [
        attribute(model, runs[i], score, {"run": other_run(model, 1 - i, rows=1)}).values["run"][:, last]
        for i in range(2)
    ]
    assert (found[0] + found[1]).abs().max() < 1e-13


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_swapping_the_ends_of_the_line_flips_integrated_gradients(arch):
    model = double(arch)
    engine, batch = SuffixEngine(model), Batch(tokens(1, 7))
    states = clean_states(model, batch)
    baseline = other_run(model, rows=1)
    moved = states.attention[1] - _move(model, states, baseline, batch)
    z = dict(baseline.z) | {1: _kept(states, baseline, batch)}
    with torch.no_grad():
        logits = run_attended(engine, batch, states, {1: moved})
    other = states._replace(z=z, attention={1: moved}, logits=logits)
    there = integrated_gradients(engine, batch, score, [1], baseline, 12, states)
    back = integrated_gradients(engine, batch, score, [1], Baseline(states.z), 12, other)
    assert (there.values + back.values).abs().max() < 1e-9 * there.values.abs().max()
    assert (there.start - back.end).abs().max() < 1e-12


def _kept(states, baseline, batch):
    return torch.where(batch.counted[..., None, None], baseline.z[1], states.z[1])


def _move(model, states, baseline, batch):
    move = (states.z[1] - baseline.z[1]).flatten(-2) @ head_weights(model, 1).flatten(0, 1)
    return move * batch.counted[..., None]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_integrated_gradients_are_complete(arch, monkeypatch):
    model, batch = double(arch), Batch(tokens(2, 7))
    engine, baseline = SuffixEngine(model), other_run(model)
    found = integrated_gradients(engine, batch, score, None, baseline, 32)
    assert found.values.shape == (2, LAYERS, HEADS)
    assert (found.values.sum(2) - (found.end[:, None] - found.start.T)).abs().max() < 1e-6
    assert found.error.max() < 1e-6
    assert (found.end - score(batch.run(model))).abs().max() < 1e-12
    for layer in range(LAYERS):  # together, alone and in parts
        alone = integrated_gradients(engine, batch, score, [layer], baseline, 32)
        assert (alone.values[:, 0] - found.values[:, layer]).abs().max() < 1e-9
        assert (alone.start[0] - found.start[layer]).abs().max() < 1e-9
    turned = integrated_gradients(engine, batch, score, range(LAYERS)[::-1], baseline, 32)
    assert all(torch.equal(a, b) for a, b in zip(turned, found, strict=True))
    monkeypatch.setattr(attribution, "TOKENS_WITH_GRADIENT", 2 * batch.tokens.numel())
    cut = integrated_gradients(engine, batch, score, None, baseline, 32)
    assert (cut.values - found.values).abs().max() < 1e-9


def test_more_nodes_miss_less_and_one_step_of_a_linear_number_misses_nothing():
    model, batch = double(), Batch(tokens(2, 7))
    engine = SuffixEngine(model)
    errors = [integrated_gradients(engine, batch, score, [1], ZERO, steps).error for steps in (1, 4, 16)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    plain = double("gpt2")
    plain.transformer.ln_f, last = nn.Identity(), LAYERS - 1
    plain.transformer.h[-1].mlp.c_proj.weight.zero_()
    one = integrated_gradients(SuffixEngine(plain), batch, score, [last], ZERO, 1)
    assert one.error < 1e-12
    assert (one.values[:, 0] - grad_x_act(plain, batch, score)[:, last]).abs().max() < 1e-12


def test_integrated_gradients_agree_with_captum():
    """Captum moves z itself at every position; so does this when the first position is counted."""
    model, ids = double(), tokens(1, 7)
    batch = Batch(ids, where=torch.ones(1, 7, dtype=torch.bool))
    projection = model.model.layers[1].self_attn.o_proj
    theirs = LayerIntegratedGradients(lambda ids: score(model(ids).logits[:, -1]), projection)
    values = theirs.attribute(ids, n_steps=16, method="gausslegendre", attribute_to_layer_input=True)
    wanted = values.detach().unflatten(-1, (HEADS, -1)).sum((1, 3))
    # Captum's baseline is what the layer makes of token 0 at every position.
    zero = Baseline(clean_states(model, Batch(torch.zeros_like(ids))).z)
    mine = integrated_gradients(SuffixEngine(model), batch, score, [1], zero, 16)
    assert (mine.values[:, 0] - wanted).abs().max() < 1e-9


def test_padding_a_prefix_and_inference_mode_change_nothing():
    model, ids = double(), tokens(2, 9)
    where = torch.zeros(2, 9, dtype=torch.bool)
    where[:, 4:7] = True
    at = torch.tensor([6, 6])
    whole = attribute(model, Batch(ids, where=where, logits_at=at), score, {"zero": ZERO})
    mask = (torch.arange(9) < 7).long().expand(2, -1)
    padded = Batch(ids.masked_fill(mask == 0, 1), mask, where, at)
    engine = SuffixEngine(model)
    short = Batch(ids[:1, 4:7], where=where[:1, 4:7], prefix=engine.prefill(ids[:1, :4]))
    with torch.inference_mode():
        assert (grad_x_act(model, padded, score) - whole.values["zero"]).abs().max() < 1e-12
    assert (
        grad_x_act(model, short, score) - whole.values["zero"][:1]
    ).abs().max() < 1e-6  # rotary in float32


def test_the_first_position_is_left_out_unless_asked_for():
    batch = Batch(tokens(2, 5))
    assert batch.counted.tolist() == [[False] + 4 * [True]] * 2
    masked = Batch(tokens(1, 5), torch.tensor([[1, 1, 1, 0, 0]]))
    assert masked.counted.tolist() == [[False, True, True, False, False]]
    model = double()
    every = Batch(batch.tokens, where=torch.ones(2, 5, dtype=torch.bool))
    assert not torch.equal(grad_x_act(model, batch, score), grad_x_act(model, every, score))


def test_half_precision_is_contracted_in_float32():
    model = tiny_model("llama", LAYERS, dtype=torch.bfloat16)
    ids = tokens(1, 7)
    found = grad_x_act(model, Batch(ids), score)
    exact = grad_x_act(tiny_model("llama", LAYERS, dtype=torch.float32), Batch(ids), score)
    assert found.dtype == torch.float64
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_running_from_the_attention_is_the_whole_run(arch):
    model = tiny_model(arch, LAYERS)
    batch, engine = Batch(tokens(2, 7)), SuffixEngine(model)
    states = clean_states(model, batch)
    for layer in range(LAYERS):
        given = states.attention[layer]
        assert torch.equal(run_attended(engine, batch, states, {layer: given}), states.logits)  # 0
        again = run_attended(engine, batch, states, {layer: given.repeat(3, 1, 1)}).unflatten(0, (3, 2))
        assert (again - states.logits).abs().max() < 1e-5  # 4e-7: another batch shape


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["whole", "padded", "after a prefix"])
def test_rows_that_join_at_their_layer_are_as_if_run_alone(arch, kind):
    model, ids = tiny_model(arch, LAYERS), tokens(2, 7)
    engine = SuffixEngine(model)
    mask = (torch.arange(7) < torch.tensor([[5], [7]])).long() if kind == "padded" else None
    at = None if mask is None else mask.sum(1) - 1
    batch = Batch(ids, mask, logits_at=at)
    if kind == "after a prefix":
        batch = Batch(ids[:1, 3:], prefix=engine.prefill(ids[:1, :3]))
    states = clean_states(model, batch)
    given = {
        layer: torch.cat([states.attention[layer] * (1 + 0.5 * copy) for copy in range(layer + 1)])
        for layer in range(LAYERS)
    }
    together = run_attended(engine, batch, states, given)
    alone = torch.cat([run_attended(engine, batch, states, {layer: part}) for layer, part in given.items()])
    assert together.shape == alone.shape
    assert (together - alone).abs().max() < 1e-5


def test_layers_without_softmax_heads_are_left_out():
    model = tiny_model("llama", LAYERS)
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert head_layers(model) == [0, 2]
    del model.model.layers[2].self_attn
    assert head_layers(model) == [0]


def test_another_number_of_heads_is_refused():
    model = tiny_model("llama", LAYERS)
    wrong = Baseline({0: torch.zeros(1, 1, HEADS + 1, 8)})
    with pytest.raises(UsageError, match=r"has 5 heads; allowed: 4, those of the model"):
        attribute(model, Batch(tokens(1, 5)), score, {"other_model": wrong})
