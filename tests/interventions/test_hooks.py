"""Laws of reading and editing a running model. Residuals in comments: largest over the six architectures."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from mechdiff.errors import SiteError, UsageError
from mechdiff.interventions.hooks import (
    cache_layer,
    get_blocks,
    head_weights,
    intervene,
    record,
    stop_after,
)
from mechdiff.interventions.sites import COMPONENTS, Site
from tests.models import HEADS, WIDTH, tiny_model, tokens

LAYERS = 4
EVERYWHERE = [Site(layer, component) for layer in range(LAYERS) for component in COMPONENTS]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def put(value):
    return lambda _activation, _positions: value


def add_one(activation, _positions):
    return activation + 1


def test_blocks_are_found_on_every_architecture(model):
    blocks = get_blocks(model)
    assert len(blocks) == LAYERS
    assert all("Layer" in type(b).__name__ or "Block" in type(b).__name__ for b in blocks)


def test_recorded_shapes(model):
    with record(model, EVERYWHERE) as kept:
        assert kept == {}
        logits(model, tokens(2, 5))
    width = head_weights(model, 0).shape[1]
    assert list(kept) != []
    for site in EVERYWHERE:
        last = {"head_z": (HEADS, width), "head_out": (HEADS, WIDTH)}.get(site.component, (WIDTH,))
        assert kept[site].shape == (2, 5, *last)


def test_recorded_residuals_are_the_models_own(model):
    ids = tokens(2, 7)
    with record(model, [Site(i) for i in range(LAYERS)]) as kept:
        logits(model, ids)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):  # hidden_states[i] is the input of block i; the last one is normalised
        assert torch.equal(kept[Site(layer)], states[layer + 1])


def test_no_edit_and_an_edit_that_changes_nothing_give_the_clean_logits(model):
    ids = tokens(2, 9)
    clean = logits(model, ids)
    with intervene(model, {}):
        assert torch.equal(logits(model, ids), clean)
    with intervene(model, {site: lambda h, _p: h + 0 * h for site in EVERYWHERE}):
        assert torch.equal(logits(model, ids), clean)  # 0
    assert torch.equal(logits(model, ids), clean)


def test_patching_a_models_own_activations_changes_nothing(model):
    ids = tokens(2, 9)
    with record(model, EVERYWHERE) as kept:
        clean = logits(model, ids)
    for site in EVERYWHERE:
        with intervene(model, {site: put(kept[site])}):
            assert torch.equal(logits(model, ids), clean), site  # 0
    with intervene(model, {site: put(kept[site]) for site in EVERYWHERE}):
        assert torch.equal(logits(model, ids), clean)  # 0


def test_whole_residual_from_another_prompt_gives_that_prompts_logits(model):
    with record(model, [Site(i) for i in range(LAYERS)]) as kept:
        other = logits(model, tokens(2, 9, seed=1))
    for layer in range(LAYERS):
        with intervene(model, {Site(layer): put(kept[Site(layer)])}):
            assert torch.equal(logits(model, tokens(2, 9)), other)  # 0


@pytest.mark.parametrize(("arch", "norm"), [("llama", "model.norm"), ("gpt2", "transformer.ln_f")])
def test_base_residual_in_the_last_block_goes_through_the_tuned_norm_and_head(arch, norm):
    base, tuned, ids = tiny_model(arch), tiny_model(arch, seed=1), tokens(2, 6)
    with cache_layer(base, LAYERS - 1) as kept:
        base_logits = logits(base, ids)
    last = Site(LAYERS - 1)
    expected = tuned.lm_head(tuned.get_submodule(norm)(kept[last]))
    with intervene(tuned, {last: put(kept[last])}):
        patched = logits(tuned, ids)
    assert torch.equal(patched, expected)  # 0
    assert not torch.allclose(patched, base_logits, atol=1e-2)
    tuned.get_submodule(norm).load_state_dict(base.get_submodule(norm).state_dict())
    tuned.lm_head.load_state_dict(base.lm_head.state_dict())
    with intervene(tuned, {last: put(kept[last])}):
        assert torch.equal(logits(tuned, ids), base_logits)  # 0: norm and head are shared


def pair_with_shared_ends():
    base, tuned = tiny_model("llama"), tiny_model("llama", seed=1)
    tuned.model.norm, tuned.lm_head = base.model.norm, base.lm_head
    return base, tuned, tokens(2, 9)


@pytest.mark.parametrize(("heads", "residual"), [("attn_out", 0.0), ("head_out", 5e-6)])
def test_embedding_and_every_component_from_the_donor_give_its_logits(heads, residual):
    base, tuned, ids = pair_with_shared_ends()
    sites = [Site(layer, name) for layer in range(LAYERS) for name in (heads, "mlp_out")]
    with record(base, sites) as kept:
        expected = logits(base, ids)
    with intervene(tuned, {site: put(kept[site]) for site in sites}), torch.no_grad():
        patched = tuned(inputs_embeds=base.get_input_embeddings()(ids)).logits
    # attn_out 0; head_out 6e-7: its difference is added to the recipient's own output
    assert (patched - expected).abs().max() <= residual


def test_head_z_carries_over_only_when_the_output_projection_is_shared():
    base, tuned, ids = pair_with_shared_ends()
    sites = [Site(layer, name) for layer in range(LAYERS) for name in ("head_z", "mlp_out")]
    with record(base, sites) as kept:
        expected = logits(base, ids)
    embedded = base.get_input_embeddings()(ids)
    edits = {site: put(kept[site]) for site in sites}
    with intervene(tuned, edits), torch.no_grad():
        assert (tuned(inputs_embeds=embedded).logits - expected).abs().max() > 1e-2
    for mine, other in zip(get_blocks(tuned), get_blocks(base), strict=True):
        mine.self_attn.o_proj = other.self_attn.o_proj
    with intervene(tuned, edits), torch.no_grad():
        assert torch.equal(tuned(inputs_embeds=embedded).logits, expected)  # 0


def test_equal_models_have_no_effect_on_each_other(model):
    twin, ids = copy.deepcopy(model), tokens(2, 9)
    with record(twin, EVERYWHERE) as kept:
        logits(twin, ids)
    clean = logits(model, ids)
    for site in EVERYWHERE:
        with intervene(model, {site: put(kept[site])}):
            assert torch.equal(logits(model, ids), clean)  # 0


def test_an_edit_leaves_earlier_positions_unchanged(model):
    ids = tokens(2, 9)
    clean = logits(model, ids)
    for site in EVERYWHERE:

        def bump(h, p):
            return h + (p == 4).view(*p.shape, *[1] * (h.ndim - 2)) * torch.arange(h.shape[-1])

        with intervene(model, {site: bump}):
            edited = logits(model, ids)
        assert torch.equal(edited[:, :4], clean[:, :4])  # 0
        assert not torch.equal(edited[:, 4], clean[:, 4])


def test_contributions_of_heads_sum_to_the_attention_output(arch_f64):
    model, sites = arch_f64, [Site(2, "head_z"), Site(2, "head_out"), Site(2, "attn_out")]
    with record(model, sites) as kept:
        logits(model, tokens(2, 9))
    z, contribution, attention = (kept[site] for site in sites)
    attn = get_blocks(model)[2].get_submodule(
        {"gpt2": "attn", "gpt_neox": "attention"}.get(model.config.model_type, "self_attn")
    )
    projection = next(m for n, m in attn.named_children() if n in ("o_proj", "c_proj", "dense"))
    bias = 0 if projection.bias is None else projection.bias
    assert (contribution.sum(2) + bias - attention).abs().max() < 1e-14  # 7e-16
    by_hand = torch.stack([z[:, :, h] @ head_weights(model, 2)[h] for h in range(HEADS)], dim=2)
    assert (contribution - by_hand).abs().max() < 1e-14  # 0


@pytest.fixture(params=["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def arch_f64(request):
    return tiny_model(request.param, dtype=torch.float64)


def test_silencing_every_head_drops_the_attention_output(model):
    ids = tokens(2, 9)
    with (
        intervene(model, {Site(1, "head_z"): lambda z, _p: z * 0}),
        record(model, [Site(1, "attn_out")]) as kept,
    ):
        silent = logits(model, ids)
    bias = kept[Site(1, "attn_out")]
    assert torch.equal(bias, bias[:1, :1].expand_as(bias))  # the bias of the projection, or 0
    with intervene(model, {Site(1, "attn_out"): lambda h, _p: h * 0 + bias[0, 0]}):
        assert torch.equal(logits(model, ids), silent)  # 0
    with (
        intervene(model, {Site(1, "head_out"): lambda h, _p: h * 0}),
        record(model, [Site(1, "attn_out")]) as kept,
    ):
        logits(model, ids)
    # by differences only up to rounding, which a norm behind the attention (Gemma) would magnify
    assert (kept[Site(1, "attn_out")] - bias).abs().max() < 2e-6  # 2e-7


def test_recorded_is_what_the_edits_returned_in_either_order(model):
    ids = tokens(2, 5)
    for site in [Site(1, component) for component in COMPONENTS]:
        with record(model, [site]) as before:
            logits(model, ids)
        with (
            record(model, [site]) as outside,
            intervene(model, {site: add_one}),
            record(model, [site]) as inside,
        ):
            logits(model, ids)
        assert torch.equal(outside[site], before[site] + 1)
        assert torch.equal(inside[site], before[site] + 1)


def test_no_later_edit_changes_what_was_recorded(model):
    def in_place(h, _p):
        return h.mul_(3).add_(1)

    ids = tokens(2, 5)
    sites = [Site(1, component) for component in COMPONENTS]
    with record(model, EVERYWHERE) as first:
        logits(model, ids)
    copies = {site: value.clone() for site, value in first.items()}
    lower = [site for site in EVERYWHERE if site.layer == 0]
    with record(model, lower) as kept, intervene(model, {site: in_place for site in sites}), torch.no_grad():
        model(ids)
    assert all(torch.equal(first[site], copies[site]) for site in EVERYWHERE)
    assert all(torch.equal(kept[site], copies[site]) for site in lower)


def test_an_in_place_edit_of_a_contribution_still_counts(model):
    ids = tokens(2, 5)
    with intervene(model, {Site(1, "head_out"): lambda h, _p: h.mul_(2)}):
        in_place = logits(model, ids)
    with intervene(model, {Site(1, "head_out"): lambda h, _p: h * 2}):
        assert torch.equal(logits(model, ids), in_place)
    assert not torch.equal(logits(model, ids), in_place)


def test_edits_nest_from_the_outside_in(model):
    ids = tokens(1, 4)
    with cache_layer(model, 1) as kept, intervene(model, {Site(1): add_one}):
        with intervene(model, {Site(1): lambda h, _p: h * 2}):
            logits(model, ids)
        nested = kept[Site(1)]
        logits(model, ids)
    assert torch.equal(nested, kept[Site(1)] * 2)


def test_an_edit_that_raises_leaves_no_hook(model):
    def fail(_h, _p):
        raise RuntimeError("on purpose")

    before = hook_count(model)
    for site in [Site(1, component) for component in COMPONENTS]:
        with (
            pytest.raises(RuntimeError, match="on purpose"),
            record(model, [site]),
            intervene(model, {site: fail}),
        ):
            logits(model, tokens(1, 4))
        assert hook_count(model) == before


def test_gradients_reach_a_leaf_added_by_an_edit():
    model, ids = tiny_model("llama", dtype=torch.float64), tokens(1, 6)
    leaf = torch.zeros(1, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    with intervene(model, {Site(1): lambda h, _p: h + leaf}):
        model(ids).logits[0, -1, 3].backward()
        slopes = []
        for step in (1e-3, -1e-3):
            moved = torch.zeros_like(leaf)
            moved[0, 2, 5] = step
            with intervene(model, {Site(1): lambda h, _p, moved=moved: h + moved}):
                slopes.append(logits(model, ids)[0, -1, 3])
    # 5e-5 relative: the normalisation inside the model is computed in float32
    assert leaf.grad[0, 2, 5] == pytest.approx(((slopes[0] - slopes[1]) / 2e-3).item(), rel=1e-2)


# Positions


def steer(h, p):
    """Depend on the position, so that a wrong one shows."""
    return h + torch.sin(p[..., None] * 1.0 + torch.arange(h.shape[-1])) * (p[..., None] >= 2)


def seen(model, layer=1):
    positions = []
    return positions, intervene(model, {Site(layer): lambda h, p: positions.append(p.clone()) or h})


def test_positions_without_and_with_a_cache(model):
    ids = tokens(2, 8)
    positions, context = seen(model)
    with context, torch.no_grad():
        model(ids)
        cache = DynamicCache(config=model.config)
        for chunk in ids.split([3, 4, 1], dim=1):
            model(chunk, past_key_values=cache, use_cache=True)
    assert torch.equal(positions[0], torch.arange(8).expand(2, -1))
    assert [p[0].tolist() for p in positions[1:]] == [[0, 1, 2], [3, 4, 5, 6], [7]]


def test_chunked_prefill_and_decoding_steer_as_one_pass_does(model):
    ids = tokens(2, 12)
    with intervene(model, {Site(1): steer}), torch.no_grad():
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        parts = [
            model(chunk, past_key_values=cache, use_cache=True).logits
            for chunk in ids.split([5, 3, 1, 1, 2], 1)
        ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5  # 1e-6
    assert (whole - logits(model, ids)).abs().max() > 1e-2


def test_left_padding_with_positions_is_no_padding_is_right_padding(model):
    ids = tokens(1, 7)
    pad, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 7, dtype=torch.long)
    with intervene(model, {Site(1): steer}):
        plain = logits(model, ids)
        right = logits(model, torch.cat([ids, pad], 1), attention_mask=torch.cat([ones, pad], 1))
        mask = torch.cat([pad, ones], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        left = logits(model, torch.cat([pad, ids], 1), attention_mask=mask, position_ids=places)
    assert (right[:, :7] - plain).abs().max() < 1e-5  # 5e-7
    assert (left[:, 3:] - plain).abs().max() < 1e-5  # 5e-7


def test_steered_generation_is_the_same_with_and_without_a_cache(model):
    ids = tokens(2, 5)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    options["attention_mask"] = torch.ones_like(ids)
    with intervene(model, {Site(1): steer, Site(2, "head_out"): lambda h, _p: h * 1.5}):
        cached = model.generate(ids, use_cache=True, **options)
        plain = model.generate(ids, use_cache=False, **options)
        replay = logits(model, cached.sequences)[:, 4:-1]
    assert torch.equal(cached.sequences, plain.sequences)
    steps = torch.stack(cached.logits, 1)
    assert (steps - torch.stack(plain.logits, 1)).abs().max() < 1e-5  # 1e-6
    assert (steps - replay).abs().max() < 1e-5  # 1e-6


def test_positions_of_a_block_that_is_not_told_them():
    model, positions = tiny_model("gpt2"), []
    block, hidden = get_blocks(model)[1], torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    with intervene(model, {Site(1): lambda h, p: positions.append(p) or h}), torch.no_grad():
        block(hidden, cache)
        block(hidden_states=hidden[:, :1], past_key_values=cache)
        block(hidden)
    assert [p.tolist() for p in positions] == [[[0, 1, 2]] * 2, [[3]] * 2, [[0, 1, 2]] * 2]


# Stopping


def test_stop_after_runs_nothing_above_and_changes_nothing_below(model):
    ids, ran = tokens(2, 6), []
    with record(model, [Site(0), Site(1)]) as full:
        clean = logits(model, ids)
    watch = {Site(layer): lambda h, _p, layer=layer: ran.append(layer) or h for layer in range(LAYERS)}
    with (
        record(model, [Site(0), Site(1)]) as kept,
        stop_after(model, 1),
        intervene(model, watch),
        torch.no_grad(),
    ):
        assert model(ids) is None
        assert model(input_ids=ids) is None
    assert ran == [0, 1, 0, 1]
    assert all(torch.equal(kept[site], full[site]) for site in kept)
    assert len(kept) == 2
    assert "forward" not in vars(model)
    assert torch.equal(logits(model, ids), clean)


def test_stop_after_nests_and_survives_an_error(model):
    ids, ran = tokens(1, 4), []
    watch = intervene(
        model, {Site(layer): lambda h, _p, n=layer: ran.append(n) or h for layer in range(LAYERS)}
    )
    with watch, stop_after(model, 2), stop_after(model, 0), torch.no_grad():
        assert model(ids) is None
    with pytest.raises(KeyError), stop_after(model, 1):
        raise KeyError("on purpose")
    assert ran == [0]
    assert hook_count(model) == 0
    assert logits(model, ids).shape[1] == 4


# Mistakes


@pytest.mark.parametrize(
    "edit", [lambda h, _p: h[:1], lambda h, _p: h.double(), lambda h, _p: h.mean(-1, keepdim=True)]
)
def test_a_change_of_shape_or_type_is_refused(edit):
    model = tiny_model("llama")
    message = r"resid_post\.1 returned .*allowed: \(2, 4, 32\) torch\.float32"
    with pytest.raises(UsageError, match=message), intervene(model, {Site(1): edit}):
        logits(model, tokens(2, 4))
    assert hook_count(model) == 0


def test_sites_that_do_not_exist_are_refused_before_the_forward():
    model = tiny_model("llama")
    with pytest.raises(SiteError, match="0 to 3"), record(model, [Site(0), Site(4)]):
        pass
    with pytest.raises(SiteError, match="0 to 3"), stop_after(model, 4):
        pass
    with pytest.raises(SiteError, match="0 to 3"):
        head_weights(model, 4)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=20,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )
    with (
        pytest.raises(SiteError, match="OPTDecoderLayer has no mlp"),
        record(opt, [Site(1), Site(1, "mlp_out")]),
    ):
        pass
    assert hook_count(opt) == 0
    with record(opt.eval(), [Site(1, "head_out"), Site(1, "attn_out")]) as kept:
        logits(opt, tokens(1, 4) % 20)
    assert (kept[Site(1, "head_out")].sum(2) - kept[Site(1, "attn_out")]).abs().max() < 1e-6  # 2e-9


def test_other_models_are_refused_by_name():
    with pytest.raises(UsageError, match="Linear is not a decoder-only"):
        get_blocks(nn.Linear(2, 2))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    )
    with pytest.raises(UsageError, match="T5ForConditionalGeneration"):
        get_blocks(t5)
    crossed = tiny_model("llama")
    crossed.model.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(LAYERS))
    with pytest.raises(UsageError, match="found 2 lists"):
        get_blocks(crossed)


def test_a_projection_that_cannot_be_split_is_refused():
    model = tiny_model("llama")
    get_blocks(model)[1].self_attn.o_proj = nn.Identity()
    with (
        pytest.raises(SiteError, match=r"Identity is no output projection"),
        record(model, [Site(1, "head_out")]),
    ):
        pass
    get_blocks(model)[1].self_attn.o_proj = nn.Linear(30, WIDTH)
    with pytest.raises(SiteError, match="4 heads"), record(model, [Site(1, "head_out")]):
        pass
