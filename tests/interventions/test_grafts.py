"""Grafts and interpolation on six architectures. Every identity here is bitwise unless it says otherwise."""

from contextlib import ExitStack

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mechdiff.errors import PairError, SiteError, UsageError
from mechdiff.interventions.grafts import (
    changed,
    check_same_architecture,
    comparable,
    component_tensors,
    components,
    graft,
    graft_shuffled,
    interpolate,
    is_tied,
)
from mechdiff.interventions.hooks import get_blocks
from mechdiff.interventions.suffix import SuffixEngine
from tests.models import VOCAB, tiny_config, tiny_model, tokens


@pytest.fixture
def donor(model):
    return tiny_model(model.config.model_type, seed=1)


@pytest.fixture
def llama():
    return tiny_model("llama")


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens(2, 9) if ids is None else ids).logits


def clone(model, **changes):
    """Copy a model, with other values in the configuration."""
    config = type(model.config)(**{**model.config.to_dict(), **changes})
    twin = type(model)(config).to(model.dtype).eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


def enlarged(model, rows, order):
    """Build a model with a larger table in which token i of the old one is token `order[i]`."""
    config = type(model.config)(**{**model.config.to_dict(), "vocab_size": rows})
    twin = type(model)(config).eval().requires_grad_(False)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = torch.randn(rows, state[name].shape[1], generator=torch.Generator().manual_seed(3))
        table[order] = state[name]
        state[name] = table
    twin.load_state_dict(state)
    return twin


def test_all_weights_of_the_donor_give_its_logits_and_afterwards_the_recipient_is_itself(model, donor):
    before = logits(model)
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}
    with graft(model, donor, "all"):
        assert torch.equal(logits(model), logits(donor))
        assert all(  # by reference, nothing is copied
            p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), donor.parameters(), strict=True)
        )
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storage
    assert torch.equal(logits(model), before)


def test_components_cover_the_model_and_make_the_donor_together(model, donor):
    names = [n for n in components(model) if n != "all" and n.partition(".")[0] not in ("attn", "mlp")]
    owners = {n: component_tensors(model, n) for n in names}
    held = [id(t) for tensors in owners.values() for t in {id(t): t for t in tensors.values()}.values()]
    assert sorted(held) == sorted({id(t) for t in model.state_dict(keep_vars=True).values()})  # each once
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(graft(model, donor, name))
        assert torch.equal(logits(model), logits(donor))


def test_a_part_of_a_block_holds_its_own_tensors_and_no_norm_of_the_block(llama):
    attn, mlp, block = (component_tensors(llama, f"{kind}.1").keys() for kind in ("attn", "mlp", "block"))
    assert {name.rsplit(".", 2)[1] for name in attn} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.rsplit(".", 2)[1] for name in mlp} == {"gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[3] for name in block - attn - mlp} == {
        "input_layernorm",
        "post_attention_layernorm",
    }


def test_a_component_that_is_equal_in_both_changes_nothing(model):
    donor = clone(model)
    next(iter(component_tensors(donor, "mlp.2").values())).mul_(1.5)
    before = logits(model)
    moved = set()
    for name in components(model):
        with graft(model, donor, name):
            if not torch.equal(logits(model), before):
                moved.add(name)
        assert bool(changed(model, donor, name)) == (name in {"mlp.2", "block.2", "all"})
    assert moved == {"mlp.2", "block.2", "all"}
    assert changed(model, donor, "mlp.2") == changed(model, donor, "block.2") == changed(model, donor, "all")


def test_only_the_blocks_from_the_graft_up_have_to_run_again(model, donor):
    engine, ids = SuffixEngine(model), tokens(3, 9)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    states, _ = engine.clean(ids, mask, range(4))
    for name, below in (("block.2", 1), ("attn.3", 2), ("mlp.1", 0), ("norm", 3)):
        with graft(model, donor, name), torch.no_grad():
            whole = engine.clean(ids, mask, [], logits_at=mask.sum(1) - 1).logits
            again = engine.resume(below, states[below], ids, mask, logits_at=mask.sum(1) - 1)
        assert torch.equal(again, whole)


def test_the_recipient_is_restored_when_something_fails_inside(llama):
    donor, before = tiny_model("llama", seed=1), logits(llama)
    with pytest.raises(KeyError), graft(llama, donor, "block.1"), interpolate(donor, llama, 0.3):
        raise KeyError
    assert torch.equal(logits(llama), before)
    donor.lm_head = torch.nn.Linear(32, VOCAB + 1, bias=False)
    with pytest.raises(PairError), graft(llama, donor, "all"):
        pass
    assert torch.equal(logits(llama), before)


def test_tied_tables_are_one_component():
    model, donor = tiny_model("gpt2"), tiny_model("gpt2", seed=1)
    assert is_tied(model)
    assert "head" not in components(model)
    assert {"transformer.wte.weight", "lm_head.weight"} <= component_tensors(model, "embed").keys()
    with graft(model, donor, "embed"):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.lm_head.weight, donor.lm_head.weight)
    with pytest.raises(PairError, match="'head' is unknown"), graft(model, donor, "head"):
        pass
    untied = clone(model, tie_word_embeddings=False)
    assert not is_tied(untied)
    with pytest.raises(PairError, match="both or neither"), graft(model, untied, "all"):
        pass


def test_of_different_vocabularies_the_shared_rows_are_grafted(llama):
    order = torch.randperm(VOCAB + 5, generator=torch.Generator().manual_seed(0))[:VOCAB]
    donor = enlarged(tiny_model("llama", seed=1), VOCAB + 5, order)
    shared = torch.arange(0, VOCAB, 2)
    rows = (shared, order[shared])
    ids = shared[:8][None]
    own = llama.model.embed_tokens.weight.clone()
    with graft(llama, donor, "all", rows):
        got = logits(llama, ids)[..., shared]
        table = llama.model.embed_tokens.weight
        assert torch.equal(table[shared], donor.model.embed_tokens.weight[order[shared]])
        assert torch.equal(table[1::2], own[1::2])  # tokens that are not shared keep the recipient's rows
    wanted = logits(donor, order[ids])[..., order[shared]]
    assert (got - wanted).abs().max() < 1e-6  # tables of another length: other rounding
    assert torch.equal(llama.model.embed_tokens.weight, own)
    check_same_architecture(llama, donor, rows)
    with pytest.raises(PairError, match=r"61 and 66 rows.*shared tokens"), graft(llama, donor, "embed"):
        pass
    with graft(llama, donor, "block.0"):  # blocks know no vocabulary
        pass
    pairs = comparable(llama, donor, "embed", rows)
    assert [tuple(a.shape) for pair in pairs.values() for a in pair] == [(31, 32), (31, 32)]


def test_one_vocabulary_in_another_order_is_no_change(llama):
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    donor, rows = enlarged(llama, VOCAB, order), (torch.arange(VOCAB), order)
    assert not changed(llama, donor, "all", rows)
    assert changed(llama, donor, "all") == {"model.embed_tokens.weight", "lm_head.weight"}


def test_interpolation_is_either_model_at_its_ends_and_the_mean_between(model, donor):
    ends = {0.0: logits(donor), 1.0: logits(model)}
    for lambda_, wanted in ends.items():
        with interpolate(donor, model, lambda_) as running:
            assert running is model
            assert torch.equal(logits(running), wanted)
    name, weight = next(iter(component_tensors(model, "mlp.1").items()))
    own, other = weight.clone(), donor.state_dict()[name]
    for lambda_ in (0.25, 1.5):
        with interpolate(donor, model, lambda_):
            wanted = other.double() + lambda_ * (own.double() - other.double())
            assert (weight.double() - wanted).abs().max() < 1e-7
    assert torch.equal(logits(model), ends[1.0])


def test_interpolation_copies_only_what_differs(llama):
    donor = clone(llama)
    donor.model.layers[2].mlp.up_proj.weight.mul_(2)
    before = {name: p.data_ptr() for name, p in llama.named_parameters()}
    with interpolate(donor, llama, 0.5):
        moved = {name for name, p in llama.named_parameters() if p.data_ptr() != before[name]}
    assert moved == {"model.layers.2.mlp.up_proj.weight"}
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="lambda_ is"), interpolate(donor, llama, wrong):
            pass


def test_half_precision_is_interpolated_in_single_precision():
    base, tuned = (tiny_model("llama", seed=s, dtype=torch.bfloat16) for s in (0, 1))
    wanted = torch.lerp(base.lm_head.weight.float(), tuned.lm_head.weight.float(), 0.25).bfloat16()
    with interpolate(base, tuned, 0.25):
        assert torch.equal(tuned.lm_head.weight, wanted)
    whole = tiny_model("llama")
    with graft(whole, base, "norm"):  # a donor of another precision is converted
        assert whole.model.norm.weight.dtype == torch.float32
        assert torch.equal(whole.model.norm.weight, base.model.norm.weight.float())


def test_equal_architectures_pass_the_check(model, donor):
    before = logits(model)
    check_same_architecture(model, donor)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda m: tiny_model("qwen3"), "LlamaForCausalLM and Qwen3ForCausalLM"),
        (lambda m: tiny_model("llama", layers=5), "layers.4.* is in one model only"),
        (
            lambda m: LlamaForCausalLM(LlamaConfig(**{**m.config.to_dict(), "intermediate_size": 40})),
            "equal shapes",
        ),
        (lambda m: clone(m, rms_norm_eps=0.5), "off by .* rms_norm_eps"),
        (
            lambda m: clone(m, num_attention_heads=2, num_key_value_heads=1, head_dim=16),
            "off by .*num_attention_heads",
        ),
    ],
    ids=["class", "depth", "width", "epsilon", "heads"],
)
def test_different_architectures_are_refused_by_name(llama, other, message):
    with pytest.raises(PairError, match=message) as caught:
        check_same_architecture(llama, other(llama))
    assert "\n" not in str(caught.value)


def test_unknown_components_are_refused(llama):
    donor = tiny_model("llama", seed=1)
    for name in ("layer.1", "attn", "attn.x", "heads", ""):
        with (
            pytest.raises(PairError, match=r"component .* is unknown.*block\.<layer>"),
            graft(llama, donor, name),
        ):
            pass
    with pytest.raises(SiteError, match="0 to 3"), graft(llama, donor, "mlp.4"):
        pass


def test_a_model_whose_final_norm_cannot_be_told_is_refused():
    model = GPT2LMHeadModel(GPT2Config(**{**tiny_config("gpt2").to_dict()}))
    model.transformer.extra = torch.nn.LayerNorm(32)
    with pytest.raises(PairError, match="LayerNorm, LayerNorm"):
        components(model)
    assert len(get_blocks(model)) == 4


def test_a_shuffled_graft_has_the_entries_of_the_graft_in_other_places(model, donor):
    own = {name: p.detach().clone() for name, p in component_tensors(model, "block.1").items()}
    theirs = component_tensors(donor, "block.1")
    before = logits(model)
    with graft_shuffled(model, donor, "block.1", torch.Generator().manual_seed(0)):
        now = component_tensors(model, "block.1")
        for name, old in own.items():
            change, graft_change = now[name] - old, theirs[name] - old
            torch.testing.assert_close(
                change.flatten().sort().values, graft_change.flatten().sort().values, atol=1e-6, rtol=1e-5
            )
            assert change.numel() < 8 or not graft_change.any() or not torch.equal(change, graft_change)
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with graft_shuffled(model, model, "block.1", torch.Generator().manual_seed(0)):
        assert torch.equal(logits(model), before)
