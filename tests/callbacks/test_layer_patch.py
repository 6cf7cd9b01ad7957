"""Layer patches: planted changes enter where they were planted, copies read 0, and arms are what they say."""

import dataclasses
import json
import math

import pytest
import torch

from mechdiff.callbacks.graded import refusing
from mechdiff.callbacks.layer_curve import entry
from mechdiff.callbacks.layer_patch import LayerPatch
from mechdiff.callbacks.layer_patcher import CONTROLS, wrong_site
from mechdiff.callbacks.patcher import Side
from mechdiff.errors import ConfigError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.patching import layer_patch_crossmodel
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.modules import Divergence
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.organisms import plant_null, plant_weights
from mechdiff.results import Record, Results
from tests.callbacks.pairs import pair, prompts
from tests.toys import SYSTEM, loaded
from tests.workspace import OPENINGS

ALL = [f"resid_post.{layer}" for layer in range(4)]


class Ranked(Divergence):
    """A divergence that was tested elsewhere."""

    def ranking(self):
        return dict(zip(ALL, (0.1, 0.4, 0.3, 0.2), strict=True))


def measure(callback, module, both, texts=None):
    texts = prompts() if texts is None else texts
    callback.connect(lambda: both, texts, 17)
    with torch.no_grad():
        return Results(callback.evaluate(module, both, texts))


@pytest.fixture(scope="module")
def base():
    return loaded()


@pytest.fixture
def openings(tmp_path):
    path = tmp_path / "openings.jsonl"
    rows = [{"lang": lang, "kind": k, "text": t} for lang in ("en", "kk") for k, t in OPENINGS]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("layer", range(4))
def test_a_change_of_one_block_enters_there(base, layer):
    tuned, _ = plant_weights(base, [f"block.{layer}"], 1.0)
    found = measure(LayerPatch(effect_prompts=0), Divergence(ALL), pair(base, tuned))
    for direction in ("into_tuned", "into_base"):
        for positions in ("last", "all"):
            cell = {"direction": direction, "positions": positions}
            (onset,) = found.select(quantity="patch_onset", **cell)
            assert (onset.value, onset.site) == (layer, f"resid_post.{layer}")
            for below in range(layer):
                at = {"site": f"resid_post.{below}", "control": "none", **cell}
                for r in found.select(quantity="patch_recovery", **at):
                    assert r.value == pytest.approx(0, abs=1e-4)
                assert found.select(quantity="patch_increment", **at)[0].value == pytest.approx(0, abs=1e-4)
                assert found.select(quantity="patch_kl", **at)[0].value == pytest.approx(0, abs=1e-9)
    increments = [
        r.value for r in found.select(quantity="patch_increment", positions="all", direction="into_base")
    ]
    assert max(range(4), key=increments.__getitem__) == layer


def test_a_copy_has_no_effect(base, openings):
    copy, _ = plant_null(base)
    found = measure(LayerPatch(), Ranked(ALL), pair(base, copy, openings=openings))
    for r in found:
        if r.quantity == "patch_kl":
            assert r.value == pytest.approx(0, abs=1e-9)
        elif r.quantity == "patch_effect":
            assert r.value == pytest.approx(0, abs=1e-4)
        else:
            assert r.reason == "gap_too_small"
    assert {r.quantity for r in found} == {
        "patch_kl",
        "patch_recovery",
        "patch_increment",
        "patch_onset",
        "patch_effect",
    }


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("openings") / "openings.jsonl"
    rows = [{"lang": lang, "kind": k, "text": t} for lang in ("en", "kk") for k, t in OPENINGS]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    both = pair(base, loaded(size=360, template=SYSTEM, seed=1), openings=str(path))
    callback = LayerPatch(curve_prompts=8, everywhere_prompts=12, effect_prompts=4)
    return both, callback, measure(callback, Ranked(ALL), both)


def test_records_say_what_was_measured(measured):
    _, callback, found = measured
    entering = {r.site for r in found.select(quantity="chosen_layer", by="patch_increment")}
    control_sites = {"resid_post.1", "resid_post.2", *entering}
    assert len(control_sites) < len(ALL)
    assert len({r.key for r in found}) == len(found)
    assert all(r.value is None or math.isfinite(r.value) for r in found)
    for direction in ("into_tuned", "into_base"):
        for positions, most in (("last", 16), ("all", 12)):
            for site in ALL:
                cell = {"direction": direction, "positions": positions, "site": site}
                plain = {"none", "self"} if positions == "last" else {"none"}
                held = {"none", "self", *CONTROLS} if site in control_sites else set()
                for quantity in ("patch_kl", "patch_recovery"):
                    for prompts_, controls, n in (("curve", plain, 8), ("all", held, most)):
                        records = found.select(quantity=quantity, prompts=prompts_, **cell)
                        assert {r.control for r in records} == controls
                        assert {r.n for r in records} <= {n}
                (increment,) = found.select(quantity="patch_increment", **cell)
                assert increment.n == 8
                for r in found.select(control="self", **cell):
                    assert r.value == pytest.approx(0, abs=1e-5)
    effects = found.select(quantity="patch_effect")
    assert {(r.site, r.positions, r.n, r.params["label"]) for r in effects if r.control != "none"} == {
        (site, where, 2, label)
        for site in control_sites
        for where in ("last", "all")
        for label in ("target", "neutral")
    }
    assert {r.control for r in effects} == {"none", *CONTROLS}
    chosen = found.select(quantity="chosen_layer")
    assert [(r.params["by"], r.params["rank"]) for r in chosen] == [
        ("patch_recovery", 1),
        ("patch_recovery", 2),
        ("patch_increment", 1),
        ("patch_increment", 2),
    ]
    assert {r.flags[-1] for r in chosen} == {"chosen_on_eval"}
    assert {i.quantity for i in callback.items} == {"patch_kl_to_donor", "patch_effect"}


def test_increments_add_up_to_recovery(measured):
    both = measured[0]
    found = measure(LayerPatch(effect_prompts=0, everywhere_prompts=0), Ranked(ALL), both)
    assert {r.positions for r in found} == {"last"}
    for direction in ("into_tuned", "into_base"):
        total = 0.0
        for site in ALL:
            cell = {"direction": direction, "site": site, "control": "none"}
            total += found.select(quantity="patch_increment", **cell)[0].value
            assert total == pytest.approx(
                found.select(quantity="patch_recovery", prompts="curve", **cell)[0].value, abs=1e-6
            )


def test_layers_are_chosen_on_dev_and_reported_on_eval(base):
    """What enters by the dev prompts is measured again, with controls, on the others."""
    tuned, _ = plant_weights(base, ["block.1"], 1.0)

    class Late(Ranked):
        def ranking(self):
            return dict(zip(ALL, (0.1, 0.2, 0.3, 0.4), strict=True))

    texts = prompts(2)
    dev = [dataclasses.replace(p, id=f"dev-{p.id}", split="dev") for p in texts[::2]]
    held = [p for p in texts if p not in texts[::2]]
    callback = LayerPatch(curve_prompts=6, everywhere_prompts=0, effect_prompts=0)
    found = measure(callback, Late(ALL), pair(base, tuned), [*dev, *held])
    curve = found.select(quantity="patch_recovery", prompts="curve", control="none", direction="into_tuned")
    assert [(r.split, r.n, r.site) for r in curve] == [("dev", 6, site) for site in ALL]
    (onset,) = found.select(quantity="patch_onset", direction="into_tuned")
    assert (onset.split, onset.n, onset.value) == ("dev", 6, 1)
    chosen = found.select(quantity="chosen_layer")
    assert {(r.split, r.n) for r in chosen} == {("dev", 6)}
    assert not any("chosen_on_eval" in r.flags for r in chosen)
    enters = chosen[2]
    assert (enters.params["by"], enters.value) == ("patch_increment", 1)
    for control in ("none", "self", *CONTROLS):
        (r,) = found.select(
            quantity="patch_recovery",
            prompts="all",
            control=control,
            site=enters.site,
            direction="into_tuned",
        )
        assert (r.split, r.n) == ("eval", len(held))
    assert {i.prompt for i in callback.items if i.prompt in {p.id for p in held}} == {p.id for p in held}


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"resid_post.0": 0.9, "resid_post.1": 0.5},
        # much the same order, but one of the two that differ most lies below the change
        {"resid_post.0": 0.1, "resid_post.1": 0.8, "resid_post.2": 0.7, "resid_post.3": 0.9},
    ],
)
def test_a_ranking_that_recovery_does_not_share_is_flagged(base, known):
    tuned, _ = plant_weights(base, ["block.2"], 1.0)

    class Other(Ranked):
        def ranking(self):
            return dict.fromkeys(ALL, 0.0) | known if known else {}

    found = measure(LayerPatch(effect_prompts=0, everywhere_prompts=0), Other(ALL), pair(base, tuned))
    flags = {r.flags for r in found.select(quantity="chosen_layer")}
    assert flags == {("rankings_disagree",) * bool(known) + ("chosen_on_eval",)}


def patcher_of(both, texts, controlled=(1, 2)):
    callback = LayerPatch()
    module = Divergence(ALL)
    sides = {
        role: Side(m, SuffixEngine(m.model), ids, [encode(m.tokenizer, p.text) for p in texts])
        for role, m, ids in (
            ("base", both.base, both.shared.base_ids),
            ("tuned", both.tuned, both.shared.tuned_ids),
        )
    }
    for side in sides.values():
        side.read([Site.parse(s) for s in ALL])
    return callback._patcher(module, sides, "tuned", "base", [Site(i) for i in controlled], texts)


@torch.no_grad()
def test_arms_equal_the_whole_model_under_a_hook(measured):
    both, texts = measured[0], prompts()[::3]
    patcher = patcher_of(both, texts)
    model = both.tuned.model
    for index in (0, 4):
        where = patcher.where[index]
        for positions in ("last", "all"):
            found = (
                patcher.last(index)
                if positions == "last"
                else ((site, p) for _, site, p in patcher.everywhere([index]))
            )
            chosen = where == 0 if positions == "last" else where >= 0
            for site, log_p in found:
                for arm, row in zip(patcher.arms_at(site, positions), log_p, strict=True):
                    states = patcher.donated(index, site, arm)[None]
                    mask = chosen[None] & (arm != "self")
                    ids = patcher.recipient.ids(index)
                    logits = layer_patch_crossmodel(model, ids, None, site, states, mask)
                    torch.testing.assert_close(
                        row, patcher.recipient.restricted(logits)[0], atol=1e-5, rtol=0
                    )


@torch.no_grad()
def test_effects_equal_the_whole_model_under_a_hook(measured):
    both, texts = measured[0], prompts()[::3]
    patcher, index = patcher_of(both, texts), 2
    graded = refusing(tuple([t for k, t in OPENINGS if k == kind][:2] for kind in ("refuse", "comply")))
    cells = [(Site(i), arm, w) for i in (0, 2) for arm in ("raw", "random") for w in ("last", "all")]
    clean, nats = patcher.readings(index, graded, cells)
    model, ids = both.tuned.model, patcher.recipient.ids(index)

    def odds(site, arm, positions):
        where = patcher.where[index]
        where = where == 0 if positions == "last" else where >= 0
        states, scores = patcher.donated(index, site, arm)[None], []
        for text in graded.texts:
            follow = torch.tensor([both.tuned.tokenizer(text, add_special_tokens=False).input_ids])
            whole = torch.cat([ids, follow], 1)
            at = torch.arange(ids.shape[1] - 1, whole.shape[1] - 1)[None]
            mask = where[None] & (arm != "self")
            logits = layer_patch_crossmodel(model, whole, None, site, states, mask, logits_at=at)
            scores.append(logits[0].log_softmax(-1).gather(1, follow[0][:, None]).sum())
        return float(graded(torch.stack(scores)))

    assert clean == pytest.approx(odds(Site(0), "self", "last"), abs=1e-5)
    for cell in cells:
        assert nats[cell] == pytest.approx(odds(*cell), abs=1e-5)
        assert abs(nats[cell] - clean) > 1e-4


@torch.no_grad()
def test_controls_are_what_they_say(measured):
    both, texts = measured[0], prompts()
    patcher = patcher_of(both, texts)
    site, index = Site(1), 3
    own, where = patcher.recipient.states[index][site], patcher.where[index]
    true = patcher.given(index, site) - own
    change = {arm: patcher.donated(index, site, arm) - own for arm in CONTROLS}
    for arm in CONTROLS:
        assert not change[arm][where < 0].any()
        assert not torch.allclose(change[arm][where >= 0], true[where >= 0], atol=1e-3)
    for arm in ("random", "wrong_layer"):
        torch.testing.assert_close(
            change[arm][where >= 0].norm(dim=-1), true[where >= 0].norm(dim=-1), rtol=1e-4, atol=1e-5
        )
    last = {
        i: (patcher.given(i, site) - patcher.recipient.states[i][site])[-1]
        for i in range(len(texts))
        if i != index
    }
    assert min((change["other_prompt"][-1] - d).abs().max() for d in last.values()) < 1e-5
    far = patcher.given(index, Site(3)) - patcher.recipient.states[index][Site(3)]
    assert torch.cosine_similarity(change["wrong_layer"][-1], far[-1], dim=0) > 0.9999
    span = torch.stack([*last.values(), true[-1]])
    span = span - span.mean(0)
    left = (
        change["random"][-1]
        - span.T @ torch.linalg.lstsq(span.T, change["random"][-1][:, None]).solution[:, 0]
    )
    assert left.norm() < 1e-3 * change["random"][-1].norm()
    assert torch.equal(patcher.donated(index, site, "random"), patcher.donated(index, site, "random"))


def test_divergences_have_their_direction(measured):
    both, callback, found = measured
    texts = prompts()
    with torch.no_grad():
        patcher = patcher_of(both, texts)
        site, log_p = next(iter(patcher.last(3, [Site(2)])))
        items = {
            (i.prompt, i.site, i.arm): i.value
            for i in callback.items
            if (i.positions, i.direction, i.quantity) == ("last", "into_tuned", "patch_kl_to_donor")
        }
        plain = run_logits(both.base.model, patcher.donor.ids(3))
        base_log_p = patcher.donor.restricted(plain)[0]
        assert items[texts[3].id, str(site), "raw"] == pytest.approx(
            kl_divergence(base_log_p, log_p[0]).item(), rel=1e-5
        )
        gap = sum(
            kl_divergence(patcher.donor.log_p[i], patcher.recipient.log_p[i]).item()
            for i in range(len(texts))
        )
        kept = sum(items[p.id, str(site), "raw"] for p in texts)
    (recovered,) = found.select(
        quantity="patch_recovery",
        site=str(site),
        positions="last",
        direction="into_tuned",
        control="none",
        prompts="all",
    )
    assert recovered.value == pytest.approx(1 - kept / gap, rel=1e-5)


def test_the_order_of_prompts_changes_no_record(measured):
    both, _, found = measured
    texts = prompts()
    shuffled = [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    again = measure(
        LayerPatch(curve_prompts=8, everywhere_prompts=12, effect_prompts=4), Ranked(ALL), both, shuffled
    )
    for ours, theirs in zip(found, again, strict=True):
        assert ours.key == theirs.key
        assert (ours.value, ours.low, ours.high) == pytest.approx(
            (theirs.value, theirs.low, theirs.high), abs=1e-5
        )


def test_a_third_model_is_compared_and_patched(base):
    both = pair(base, loaded(seed=1))
    both.__dict__["reference"] = loaded(seed=2)
    found = measure(LayerPatch(effect_prompts=0, everywhere_prompts=0), Ranked(ALL), both)
    third = found.select(model="reference")
    assert {r.quantity for r in third} >= {"cka", "cka_debiased", "patch_recovery", "patch_increment"}
    similar = found.select(quantity="cka_debiased", model="reference", contrast="tuned-reference")
    assert {r.site for r in similar} == set(ALL)
    assert {r.params["direction"] for r in third if "direction" in r.params} == {"into_tuned", "into_base"}
    for site in ALL:
        cell = {"quantity": "patch_recovery", "site": site, "control": "none", "direction": "into_tuned"}
        (by_pair,) = found.select(**cell, model="pair", positions="last", prompts="curve")
        by_third, difference = found.select(**cell, model="reference")
        assert difference.params["contrast"] == "base minus reference"
        assert difference.value == pytest.approx(by_pair.value - by_third.value, abs=1e-6)
        assert difference.low < difference.value < difference.high
        about = {"quantity": "cka_debiased", "site": site, "model": "reference"}
        cka = {r.params["contrast"]: r.value for r in found.select(**about) if "centred" not in r.params}
        further = cka.pop("reference-base minus tuned-base")
        assert further == pytest.approx(cka["base-reference"] - cka["tuned-base"], abs=1e-9)
    both.__dict__["reference"] = base
    same = measure(LayerPatch(effect_prompts=0, everywhere_prompts=0), Ranked(ALL), both)
    for site in ALL:
        (r,) = [
            r
            for r in same.select(quantity="cka", model="reference", contrast="base-reference", site=site)
            if "centred" not in r.params
        ]
        assert r.value == pytest.approx(1, abs=1e-9)
        cell = {"quantity": "patch_recovery", "site": site, "positions": "last", "direction": "into_tuned"}
        by_base, by_third = (same.select(**cell, control="none", model=m)[0] for m in ("pair", "reference"))
        assert by_third.value == pytest.approx(by_base.value, abs=1e-6)
        (difference,) = same.select(**cell, contrast="base minus reference")
        assert (difference.value, difference.low, difference.high) == pytest.approx((0, 0, 0), abs=1e-6)


def test_unequal_widths_are_said(base):
    both = pair(base, loaded(seed=1))
    both.__dict__["tuned"] = dataclasses.replace(both.tuned, width=16)
    found = measure(LayerPatch(), Divergence(ALL), both)
    assert {(r.value, r.reason) for r in found} == {(None, "unequal_widths")}


def test_a_raw_prompt_has_no_common_last_position(base):
    both = pair(base, loaded(size=360, template=None, seed=1))
    found = measure(LayerPatch(effect_prompts=0), Divergence(ALL), both)
    assert {r.reason for r in found if r.positions == "last"} == {"not_aligned"}
    assert all(r.n for r in found.select(quantity="patch_kl", positions="all"))


@pytest.mark.parametrize(
    "bad", [{"curve_prompts": 0}, {"effect_prompts": -1}, {"floor": 1.0}, {"max_prompts": -2}]
)
def test_bad_settings(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        LayerPatch(**bad)


def test_the_wrong_site_is_far():
    sites = [Site(i) for i in range(5)]
    assert wrong_site(sites, Site(0)) == Site(2)
    assert wrong_site(sites, Site(4)) == Site(1)
    assert wrong_site(sites[:1], Site(0)) == Site(0)


def test_parts_that_cancel_do_not_hide_the_first():
    """Undoing the first of them restores nothing, and moves the model."""

    def records(quantity, lows):
        about = {"question": "rq1", "unit": "fraction", "split": "dev", "positions": "last"}
        return [
            Record(quantity=quantity, value=low + 0.1, low=low, high=low + 0.2, n=8, site=site, **about)
            for site, low in zip(ALL, lows, strict=True)
        ]

    about = {"question": "rq1", "split": "dev", "positions": "last", "params": {"direction": "into_tuned"}}
    curve, moves = records("patch_recovery", [0, -0.5, -0.2, 0.6]), records("patch_kl", [0, 0.4, 0.3, 0.4])
    still = records("patch_kl", [0, 0, 0, 0])
    assert entry(curve, moves, 0.05, about).value == 1
    assert entry(curve, still, 0.05, about).value == 3
    assert entry(still, still, 0.05, about).reason == "below_floor"
