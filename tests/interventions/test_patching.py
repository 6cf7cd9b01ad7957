"""Laws of replacing activations. Residuals in comments: largest over the six architectures."""

import pytest
import torch
from transformers import DynamicCache

from mechdiff.errors import SiteError, UsageError
from mechdiff.interventions.hooks import head_weights, intervene, record
from mechdiff.interventions.patching import head_patch_or_zero, layer_patch_crossmodel, replace
from mechdiff.interventions.sites import COMPONENTS, Site
from tests.models import HEADS, WIDTH, tiny_model, tokens


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(rows, length, *columns):
    where = torch.zeros(rows, length, dtype=torch.bool)
    where[:, list(columns)] = True
    return where


def arange(rows, length):
    return torch.arange(length).expand(rows, -1)


def test_only_the_chosen_positions_change():
    value, donor, where = draw(2, 5, 3), draw(2, 5, 3, seed=1), draw(2, 5, seed=2) > 0
    edited = replace(donor, where)(value, arange(2, 5))
    assert torch.equal(edited[where], donor[where])
    assert torch.equal(edited[~where], value[~where])
    assert edited is not value


def test_donors_are_matched_by_absolute_position():
    donor, where = draw(2, 5, 3), at(2, 5, 1, 3)
    edit, value = replace(donor, where), draw(2, 3, 3, seed=1)
    chunk = edit(value, torch.tensor([[2, 3, 4], [1, 2, 3]]))
    assert torch.equal(chunk[0], torch.stack([value[0, 0], donor[0, 3], value[0, 2]]))
    assert torch.equal(chunk[1], torch.stack([donor[1, 1], value[1, 1], donor[1, 3]]))
    beyond = edit(value, torch.tensor([[5, 6, 7]] * 2))
    assert torch.equal(beyond, value)


def test_one_donor_row_serves_every_row_and_heads_keep_their_axis():
    donor, value = draw(1, 5, 4, 3), draw(3, 5, 4, 3, seed=1)
    edited = replace(donor, at(1, 5, 2))(value, arange(3, 5))
    assert torch.equal(edited[:, 2], donor[:, 2].expand(3, -1, -1))
    assert torch.equal(edited[:, 3], value[:, 3])


def test_a_patch_with_nothing_chosen_or_with_its_own_states_is_the_clean_run(model):
    ids, columns = tokens(2, 9), arange(2, 9)
    sites = [Site(1, component) for component in COMPONENTS]
    with record(model, sites) as kept:
        clean = logits(model, ids)
    for site in sites:
        nothing = torch.zeros(2, 9, dtype=torch.bool)
        noise = draw(*kept[site].shape)
        with torch.no_grad():
            none = layer_patch_crossmodel(model, ids, None, site, noise, nothing, logits_at=columns)
            own = layer_patch_crossmodel(model, ids, None, site, kept[site], ~nothing, logits_at=columns)
        assert torch.equal(none, clean)  # 0
        assert torch.equal(own, clean)  # 0


def test_a_patch_is_causal_and_padding_is_harmless(model):
    ids, columns, donor = tokens(2, 9), arange(2, 9), draw(2, 9, WIDTH)
    clean = logits(model, ids)
    patched = layer_patch_crossmodel(model, ids, None, Site(1), donor, at(2, 9, 4), logits_at=columns)
    assert torch.equal(patched[:, :4], clean[:, :4])  # 0
    assert (patched[:, 4:] - clean[:, 4:]).abs().amax(-1).min() > 1e-3
    padded, mask = torch.cat([ids, ids[:, :3] * 0], 1), torch.ones(2, 12, dtype=torch.long)
    mask[:, 9:] = 0
    longer = torch.cat([donor, donor[:, :3]], 1)
    same = layer_patch_crossmodel(model, padded, mask, Site(1), longer, at(2, 12, 4), logits_at=columns)
    assert (same - patched).abs().max() < 1e-5  # 1e-6


def test_a_patch_under_a_cache_is_the_patch_in_one_pass(model):
    ids, donor = tokens(2, 9), draw(2, 7, WIDTH)
    with intervene(model, {Site(1): replace(donor, at(2, 7, 2, 6))}), torch.no_grad():
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        parts = [
            model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([4, 3, 1, 1], 1)
        ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5  # 1e-6


def test_whole_residual_between_models_with_shared_top_gives_the_donors_logits():
    donor, recipient, ids = tiny_model("gemma2"), tiny_model("gemma2", seed=1), tokens(2, 9)
    for layer in (2, 3):
        recipient.model.layers[layer] = donor.model.layers[layer]
    recipient.model.norm, recipient.lm_head = donor.model.norm, donor.lm_head
    with record(donor, [Site(1)]) as kept:
        expected = logits(donor, ids)[:, -1]
    every = torch.ones(2, 9, dtype=torch.bool)
    patched = layer_patch_crossmodel(recipient, ids, None, Site(1), kept[Site(1)], every)
    assert (patched - expected).abs().max() < 2e-6  # 2e-7 the head is applied at one column


# Heads


def test_zeroing_a_head_removes_its_contribution(model):
    ids, site = tokens(2, 9), Site(2, "attn_out")
    with record(model, [site, Site(2, "head_out")]) as kept:
        clean = logits(model, ids)
    with record(model, [site]) as silent, head_patch_or_zero(model, 2, 1):
        changed = logits(model, ids)
    difference = kept[site] - silent[site]
    assert (difference - kept[Site(2, "head_out")][:, :, 1]).abs().max() < 2e-6  # 5e-7
    assert not torch.equal(changed, clean)
    zeros = torch.zeros(1, 9, WIDTH)
    with head_patch_or_zero(model, 2, 1, "swap", zeros):
        assert (logits(model, ids) - changed).abs().max() < 5e-6  # 6e-7
    assert torch.equal(logits(model, ids), clean)


def test_zeroing_at_some_positions_leaves_the_others(model):
    ids, site = tokens(2, 9), Site(2, "head_z")
    with record(model, [site]) as kept:
        logits(model, ids)
    with record(model, [site]) as silent, head_patch_or_zero(model, 2, 1, where=at(1, 9, 3)):
        logits(model, ids)
    expected = kept[site].clone()
    expected[:, 3, 1] = 0
    assert torch.equal(silent[site], expected)


def test_swapping_heads(model):
    ids, site = tokens(2, 9), Site(2, "head_out")
    with record(model, [site]) as kept:
        clean = logits(model, ids)
    with head_patch_or_zero(model, 2, 3, "swap", kept[site][:, :, 3]):
        assert torch.equal(logits(model, ids), clean)  # 0
    donor = draw(2, 9, WIDTH)
    with record(model, [site]) as swapped, head_patch_or_zero(model, 2, 3, "swap", donor, at(2, 9, 8)):
        logits(model, ids)
    expected = kept[site].clone()
    expected[:, 8, 3] = donor[:, 8]
    assert torch.equal(swapped[site], expected)


def test_a_rewired_output_projection_shows_in_the_contribution_and_not_in_z():
    base, tuned, ids = tiny_model("llama"), tiny_model("llama"), tokens(2, 9)
    head_weights(tuned, 2)[1].neg_()
    names = ("head_z", "head_out")
    with record(base, [Site(2, name) for name in names]) as mine, torch.no_grad():
        clean = base(ids).logits
    with record(tuned, [Site(2, name) for name in names]) as theirs, torch.no_grad():
        assert (tuned(ids).logits - clean).abs().max() > 1e-3
    assert torch.equal(mine[Site(2, "head_z")], theirs[Site(2, "head_z")])
    assert torch.equal(mine[Site(2, "head_out")][:, :, 1], -theirs[Site(2, "head_out")][:, :, 1])
    with head_patch_or_zero(tuned, 2, 1, "swap", mine[Site(2, "head_out")][:, :, 1]):
        assert (logits(tuned, ids) - clean).abs().max() < 5e-6  # 5e-7


# Mistakes


def test_mistakes_are_named():
    model, ids, donor = tiny_model("llama", layers=2), tokens(2, 5), draw(2, 5, WIDTH)
    every = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"where is \(2, 5\) torch.int64; allowed: \(2, 5\) torch.bool"):
        replace(donor, every.long())
    with pytest.raises(UsageError, match="where is"):
        replace(donor, every[:1])
    with pytest.raises(UsageError, match=r"donor is \(2, 5, 1\)"):
        layer_patch_crossmodel(model, ids, None, Site(0), donor[..., :1], every)
    with pytest.raises(UsageError, match="where has 2 rows; allowed: 1 or 3"):
        layer_patch_crossmodel(model, tokens(3, 5), None, Site(0), donor, every)
    with pytest.raises(SiteError, match="0 to 1"):
        layer_patch_crossmodel(model, ids, None, Site(2), donor, every)


@pytest.mark.parametrize(
    ("layer", "head", "mode", "donor", "match"),
    [
        (2, 0, "zero", None, "0 to 1"),
        (0, HEADS, "zero", None, "head 4 is out of range; allowed: 0 to 3"),
        (0, -1, "zero", None, "head -1"),
        (0, 0, "mean", None, "mode 'mean'"),
        (0, 0, "swap", None, "mode 'swap' with no donor"),
        (0, 0, "zero", torch.zeros(1, 5, WIDTH), "mode 'zero' with a donor"),
    ],
)
def test_heads_and_modes_that_do_not_exist_are_refused(layer, head, mode, donor, match):
    context = head_patch_or_zero(tiny_model("llama", layers=2), layer, head, mode, donor)
    with pytest.raises(UsageError, match=match), context:
        pass
