"""Heads on the handle: planted ones are found, and a batch of patches is what single patches give."""

from functools import partial

import pytest
import torch

from mechdiff.callbacks.handle_heads import HandleHeads
from mechdiff.callbacks.patcher import Side
from mechdiff.errors import ConfigError, PairError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.hooks import intervene, record
from mechdiff.interventions.patching import head_patch_or_zero
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.organisms import plant_heads
from tests.callbacks.handles import SITES, measure, pair_of, subspaces, texts
from tests.toys import loaded

PLANTED = [(0, 2), (1, 1)]


@pytest.fixture(scope="module")
def models():
    base = loaded()
    return base, plant_heads(base, PLANTED)[0]


@pytest.fixture(scope="module")
def found(models):
    base, tuned = models
    module = subspaces(base, tuned, k=4)
    callback = HandleHeads(k=4, top=3, drawn=4, max_prompts=4, rows_per_batch=5)
    return callback, measure(callback, module, pair_of(base, tuned), texts("dev")), module


def value(results, head, **cell):
    usual = {"mode": "swap", "path": "total", "metric": "projection"}
    (r,) = results.select(quantity="head_path_effect", head=head, **{**usual, **cell})
    return r


def test_the_planted_heads_have_the_highest_attribution(found):
    _, results, _ = found
    top = {r.params["head"] for r in results.select(group="attribution", metric="projection")}
    assert {"0.2", "1.1"} <= top
    drawn = {r.params["head"] for r in results.select(group="random", metric="projection")}
    assert len(top) == 3
    assert len(drawn) == 4
    assert not top & drawn
    assert all(r.control == "random" for r in results.select(group="random"))
    for head in drawn:  # their weights are those of base, and most see the same input
        assert abs(value(results, head).value) < value(results, "1.1").value
    sizes = {
        g: value(results, "mean", group=g, metric="projection_size").value for g in ("attribution", "random")
    }
    assert sizes["attribution"] > sizes["random"]


@pytest.mark.parametrize("mode", ["swap", "zero"])
def test_a_row_of_the_batch_is_one_patch_of_a_whole_run(found, models, mode):
    """The handle has the module's last site; every prompt is run again by hand."""
    callback, results, module = found
    base, tuned = models
    names = sorted({i.prompt for i in callback.items})
    prompts = [p for p in texts("dev") if p.id in names]
    site, layer, head = Site.parse(SITES[-1]), 1, 1
    basis = module.basis(site, k=4)
    inner, gap, left, apart = 0.0, 0.0, 0.0, 0.0
    for p in prompts:
        ids = torch.tensor([encode(base.tokenizer, p.text).input_ids])
        with record(base.model, [site, Site(layer, "head_out")]) as seen, torch.no_grad():
            reference = base.model(ids).logits[0, -1].log_softmax(-1)
        wanted, donor = seen[site][0, -1], seen[Site(layer, "head_out")][:, :, head]
        with record(tuned.model, [site]) as seen, torch.no_grad():
            clean = tuned.model(ids).logits[0, -1].log_softmax(-1)
        own = seen[site][0, -1]
        where = torch.zeros(ids.shape, dtype=torch.bool)
        where[:, -1] = True
        patch = head_patch_or_zero(tuned.model, layer, head, mode, donor if mode == "swap" else None, where)
        with patch, record(tuned.model, [site]) as seen, torch.no_grad():
            patched = tuned.model(ids).logits[0, -1].log_softmax(-1)
        way = (wanted - own) @ basis.T
        inner += float(((seen[site][0, -1] - own) @ basis.T) @ way)
        gap += float(way @ way)
        left += kl_divergence(reference, patched).item()
        apart += kl_divergence(reference, clean).item()
    assert value(results, "1.1", mode=mode).value == pytest.approx(inner / gap, abs=1e-4)
    recovered = value(results, "1.1", mode=mode, metric="recovery")
    assert recovered.value is None or recovered.value == pytest.approx(1 - left / apart, abs=1e-3)


def test_the_direct_path_adds_the_change_to_the_receiver(found, models):
    callback, results, module = found
    base, _ = models
    site = Site.parse(SITES[-1])
    basis = module.basis(site, k=4)
    encoded = [encode(base.tokenizer, p.text) for p in texts("dev")]
    sides = [Side(m, SuffixEngine(m.model), torch.arange(300), encoded) for m in models]
    names = [p.id for p in texts("dev")]
    item = next(i for i in callback.items if i.arm == "1.1/swap/direct")
    index, outs = names.index(item.prompt), []
    for side in sides:
        with record(side.loaded.model, [site, Site(1, "head_out")]) as seen:
            run_logits(side.loaded.model, side.ids(index))
        outs.append((seen[site][0, -1], seen[Site(1, "head_out")][0, -1, 1]))
    (wanted, new), (own, old) = outs
    assert item.value == pytest.approx(float((new - old) @ basis.T @ ((wanted - own) @ basis.T)), rel=1e-3)
    r = value(results, "1.1", path="direct")
    assert (r.params["freeze"], r.params["norm"], r.params["receiver"]) == ("all", "recompute", SITES[-1])
    assert value(results, "1.1").params["freeze"] == "none"
    assert r.value != value(results, "1.1").value  # what runs again above it adds its part


def test_with_all_other_heads_held_only_mlps_pass_the_change_on(found, models):
    """By hand: the head is replaced in a run of its own, whose later heads are set back to what they were."""
    callback, results, module = found
    base, tuned = models
    site, head = Site.parse(SITES[-1]), Site(0, "head_out")
    later = [Site(layer, "head_out") for layer in range(1, site.layer + 1)]
    basis = module.basis(site, k=4)
    item = next(i for i in callback.items if i.arm == "0.2/swap/mlps")
    (prompt,) = (p for p in texts("dev") if p.id == item.prompt)
    ids = torch.tensor([encode(base.tokenizer, prompt.text).input_ids])
    with record(base.model, [site, head]) as seen, torch.no_grad():
        base.model(ids)
    wanted, new = seen[site][0, -1], seen[head][0, -1, 2]
    with record(tuned.model, [site, *later]) as clean, torch.no_grad():
        tuned.model(ids)

    def put(h, _positions):
        changed = h.clone()
        changed[:, -1, 2] = new
        return changed

    def hold(h, _positions, layer):
        changed = h.clone()
        changed[:, -1] = clean[layer][:, -1]
        return changed

    edits = {head: put} | {layer: partial(hold, layer=layer) for layer in later}
    with intervene(tuned.model, edits), record(tuned.model, [site]) as seen, torch.no_grad():
        tuned.model(ids)
    own = clean[site][0, -1]
    moved = (seen[site][0, -1] - own) @ basis.T
    assert item.value == pytest.approx(float(moved @ ((wanted - own) @ basis.T)), rel=1e-3)
    r = value(results, "0.2", path="mlps")
    assert r.params["freeze"] == "heads"
    assert len({r.value, value(results, "0.2").value, value(results, "0.2", path="direct").value}) == 3


def test_every_cell_is_there_once(found):
    callback, results, _ = found
    assert len({r.key for r in results}) == len(results) == 7 * (3 + 2) * 2 + 2 * 5
    assert len(callback.items) == 7 * 5 * 4
    assert all(r.low <= r.value <= r.high for r in results if r.value is not None)


def test_equal_models_say_so():
    base = loaded()
    results = measure(
        HandleHeads(top=2, drawn=1, max_prompts=2), subspaces(base, base), pair_of(base, base), texts("dev")
    )
    assert {r.reason for r in results} == {"gap_too_small"}


def test_mistakes_are_named(models):
    with pytest.raises(ConfigError, match="modes has 'noise'"):
        HandleHeads(modes=("noise",))
    with pytest.raises(ConfigError, match="top is 0"):
        HandleHeads(top=0)
    from dataclasses import replace

    other = replace(models[0], num_heads=2)
    with pytest.raises(PairError, match="4 x 4 and 4 x 2 heads"):
        list(HandleHeads().evaluate(None, pair_of(models[0], other), []))
