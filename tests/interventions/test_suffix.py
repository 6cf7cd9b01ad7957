"""The suffix engine against full forwards. Residuals in comments: largest over the six architectures."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from mechdiff.errors import SiteError, UsageError
from mechdiff.interventions.hooks import get_blocks, intervene
from mechdiff.interventions.patching import layer_patch_crossmodel
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from tests.models import WIDTH, tiny_model, tokens

LAYERS = 4


@pytest.fixture
def engine(model):
    return SuffixEngine(model)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def everywhere(ids):
    return torch.arange(ids.shape[1]).expand_as(ids)


def full_run(model, layer, hidden, ids, mask=None, logits_at=None):
    """Run the plain way: a hook that replaces the whole residual, and every block."""
    where = torch.ones(hidden.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        return layer_patch_crossmodel(model, ids, mask, Site(layer), hidden, where, logits_at=logits_at)


def test_clean_is_the_models_own_forward(engine):
    ids = tokens(3, 9)
    states, logits = engine.clean(ids, None, [0, 3], logits_at=everywhere(ids))
    with torch.no_grad():
        assert torch.equal(logits, engine.model(ids).logits)  # 0
    assert list(states) == [0, 3]
    assert states[0].shape == (3, 9, WIDTH)
    assert engine.clean(ids, None, []).logits.shape == (3, 61)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_resuming_is_the_full_run_bitwise(engine, layer):
    """With padding on the right, beyond the attention window of 4, from states that no model produced."""
    ids, hidden = tokens(3, 9), draw(3, 9, WIDTH)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    for logits_at in (None, mask.sum(1) - 1, torch.tensor([[0, 8], [5, 2], [3, 3]]), everywhere(ids)):
        resumed = engine.resume(layer, hidden, ids, mask, logits_at=logits_at)
        assert torch.equal(resumed, full_run(engine.model, layer, hidden, ids, mask, logits_at))  # 0


def test_resuming_from_clean_states_is_the_clean_run_bitwise(engine):
    ids = tokens(2, 9)
    states, logits = engine.clean(ids, None, range(LAYERS))
    for layer, state in states.items():
        assert torch.equal(engine.resume(layer, state, ids), logits)  # 0


def test_wanted_columns_are_those_of_all_logits(engine):
    ids, hidden = tokens(3, 9), draw(3, 9, WIDTH)
    every = engine.resume(1, hidden, ids, logits_at=everywhere(ids))
    some = engine.resume(1, hidden, ids, logits_at=torch.tensor([8, 2, 0]))
    expected = every[[0, 1, 2], [8, 2, 0]]
    assert (some - expected).abs().max() < 2e-6  # 4e-7: the head's product has another shape


def test_one_edited_position_with_kept_keys_is_the_full_run(engine):
    """Many cells of one token each, over one kept prefix."""
    ids, cells = tokens(1, 10), 12
    prefix = engine.prefill(ids[:, :-1])
    for layer in range(LAYERS):
        states, _ = engine.clean(ids, None, [layer])
        hidden = states[layer].repeat(cells, 1, 1)
        hidden[:, -1] += draw(cells, WIDTH)
        truth = full_run(engine.model, layer, hidden, ids.expand(cells, -1))
        reused = engine.resume(layer, hidden[:, -1:], ids[:, -1:].expand(cells, -1), prefix=prefix)
        assert (reused - truth).abs().max() < 1e-5  # 6e-7


def test_openings_after_a_patched_token_are_the_full_run(engine):
    """Rows of unequal length after one prefix, padded on the right."""
    question, openings = tokens(1, 7), tokens(3, 4, seed=1)
    tail = torch.cat([question[:, -1:].expand(3, -1), openings], 1)
    ids = torch.cat([question[:, :-1].expand(3, -1), tail], 1)
    mask = (torch.arange(5) < torch.tensor([[5], [3], [2]])).long()
    prefix = engine.prefill(question[:, :-1])
    for layer in range(LAYERS):
        states, _ = engine.clean(ids, None, [layer])
        hidden = states[layer].clone()
        hidden[:, 6] += draw(3, WIDTH)
        columns = everywhere(tail)
        truth = full_run(engine.model, layer, hidden, ids, logits_at=columns + 6)
        got = engine.resume(layer, hidden[:, 6:], tail, mask, prefix=prefix, logits_at=columns)
        assert (got - truth)[mask.bool()].abs().max() < 1e-5  # 8e-7


@pytest.mark.parametrize("kept", [False, True])
def test_batched_cells_are_looped_cells(engine, kept):
    ids, cells = tokens(1, 8), 6
    start = 5 if kept else 0
    prefix = engine.prefill(ids[:, :5]) if kept else None
    hidden, tail = draw(cells, 8 - start, WIDTH), ids[:, start:]
    batched = engine.resume(1, hidden, tail.expand(cells, -1), prefix=prefix)
    looped = [engine.resume(1, row[None], tail, prefix=prefix) for row in hidden]
    assert (batched - torch.cat(looped)).abs().max() < 1e-5  # 8e-7


def test_a_prefix_is_never_changed(engine):
    ids = tokens(2, 9)
    prefix = engine.prefill(ids[:, :6])
    before = copy.deepcopy([(layer.keys, layer.values) for layer in prefix.layers])
    first = engine.resume(1, draw(2, 3, WIDTH), ids[:, 6:], prefix=prefix)
    assert torch.equal(first, engine.resume(1, draw(2, 3, WIDTH), ids[:, 6:], prefix=prefix))
    assert prefix.get_seq_length() == 6
    for layer, (keys, values) in zip(prefix.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_the_model_is_left_as_it_was_and_no_weight_is_copied(engine):
    model = engine.model
    modules = {name: id(module) for name, module in model.named_modules()}
    view = engine.view(2, draw(1, 3, WIDTH))
    weights = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in view.parameters()} < weights
    assert len(get_blocks(view)) == LAYERS
    assert get_blocks(view)[3] is get_blocks(model)[3]
    engine.resume(2, draw(1, 3, WIDTH), tokens(1, 3))
    assert {name: id(module) for name, module in model.named_modules()} == modules


def test_edits_above_act_as_in_the_full_run(engine):
    ids, hidden = tokens(2, 9), draw(2, 9, WIDTH)
    place = torch.arange(WIDTH) * 0.1
    edits = {
        Site(1): lambda h, p: h * (p[..., None] != 3),
        Site(2, "head_out"): lambda h, p: h * p[..., None, None].clamp(max=2),
        Site(3): lambda h, p: h + torch.sin(p[..., None] + place),
    }
    with intervene(engine.model, {Site(1): lambda _h, _p: hidden}), intervene(engine.model, edits):
        truth = run_logits(engine.model, ids)
    assert torch.equal(engine.resume(1, hidden, ids, edits=edits), truth)  # 0
    prefix = engine.prefill(ids[:, :5])
    seen = []
    engine.resume(
        1, hidden[:, 5:], ids[:, 5:], prefix=prefix, edits={Site(1): lambda h, p: seen.append(p) or h}
    )
    assert seen[0].tolist() == [[5, 6, 7, 8]] * 2


def test_gradients_are_those_of_the_full_run():
    model = tiny_model("gemma2", dtype=torch.float64)
    engine, ids = SuffixEngine(model), tokens(2, 6)
    short, full = (draw(2, 6, WIDTH, dtype=torch.float64).requires_grad_() for _ in range(2))
    engine.resume(1, short, ids)[:, 3].sum().backward()
    with intervene(model, {Site(1): lambda _h, _p: full}):
        run_logits(model, ids)[:, 3].sum().backward()
    assert torch.equal(short.grad, full.grad)  # 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_resume_bitwise(dtype):
    model = tiny_model("gemma2", dtype=dtype)
    engine, ids, hidden = SuffixEngine(model), tokens(2, 9), draw(2, 9, WIDTH).to(dtype)
    assert torch.equal(engine.resume(1, hidden, ids), full_run(model, 1, hidden, ids))  # 0


class Skipping(LlamaForCausalLM):
    """Let the logits depend on the first token of the call, past every block: a tail alone is not enough."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        out = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is None:  # not in the tail after a prefix
            out.logits = out.logits + input_ids[:, :1, None]
        return out


def test_a_model_that_cannot_be_resumed_is_refused(monkeypatch):
    model = tiny_model("llama")
    skipping = Skipping(model.config).eval()
    with pytest.raises(UsageError, match=r"Skipping resumed after block 0 is off by .*key: pair"):
        SuffixEngine(skipping)
    # a forward bound to the module itself (device hooks do this) would run every block of the original
    monkeypatch.setattr(model.model, "forward", model.model.forward)
    with pytest.raises(UsageError, match="resumed after block 0 is off"):
        SuffixEngine(model)


def test_recurrent_layers_are_refused():
    config = Qwen3NextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    with pytest.raises(UsageError, match="allowed: keys and values"):
        SuffixEngine(Qwen3NextForCausalLM(config).eval())


def test_mistakes_are_named():
    engine, ids, hidden = SuffixEngine(tiny_model("llama", layers=2)), tokens(2, 5), draw(2, 5, WIDTH)
    with pytest.raises(SiteError, match="0 to 1"):
        engine.resume(2, hidden, ids)
    with pytest.raises(UsageError, match=r"allowed: \(2, 5, 32\)"):
        engine.resume(0, hidden[:, 1:], ids)
    with pytest.raises(UsageError, match="right padding"):
        engine.resume(0, hidden, ids, torch.tensor([[0, 0, 1, 1, 1]] * 2))
    with pytest.raises(UsageError, match="logits_at is"):
        engine.resume(0, hidden, ids, logits_at=torch.tensor([1]))
    with pytest.raises(UsageError, match=r"edit at resid_post\.0 cannot act"):
        engine.resume(1, hidden, ids, edits={Site(0): lambda h, _p: h})
    with pytest.raises(UsageError, match=r"edit at mlp_out\.1 cannot act"):
        engine.resume(1, hidden, ids, edits={Site(1, "mlp_out"): lambda h, _p: h})
    with pytest.raises(UsageError, match="prefix has 3 rows; allowed: 1 or 2"):
        engine.resume(0, hidden, ids, prefix=engine.prefill(tokens(3, 4)))


def test_one_block_is_enough():
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).eval()
    engine, ids, hidden = SuffixEngine(model), tokens(2, 5), draw(2, 5, 16)
    assert torch.equal(engine.resume(0, hidden, ids), full_run(model, 0, hidden, ids))
