import dataclasses
import json
import math

import pytest
import torch

from mechdiff.callbacks import MappedPatch
from mechdiff.callbacks.graded import read_openings, refusing
from mechdiff.callbacks.patcher import Patcher, Side, groups
from mechdiff.data.join import join
from mechdiff.errors import PromptError
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.functional.clt import map_states
from mechdiff.functional.metrics import kl_divergence, logodds
from mechdiff.interventions.hooks import record
from mechdiff.interventions.patching import layer_patch_crossmodel
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.pairs.alignment import align, common_template, encode, template_tokens
from mechdiff.results import Results
from tests.callbacks.pairs import SITES, evaluate, maps, pair, prompts
from tests.toys import OTHER_END, PLAIN, SYSTEM, loaded

OPENINGS = {
    "en": (["sorry no", "i may not tell"], ["sure", "yes of course"]),
    "kk": (["кешір", "жоқ"], ["иә мен", "жарайды"]),
}
OPENINGS = {
    lang: tuple([f"{text}{end}" for text in texts for end in (".", "!", ",", ":")] for texts in kinds)
    for lang, kinds in OPENINGS.items()
}
KINDS = {
    "twin": {"seed": 1},
    "tuned": {"size": 360, "template": SYSTEM, "seed": 1},
    "other_end": {"size": 360, "template": OTHER_END, "seed": 1},
    "raw": {"size": 360, "template": None, "seed": 1},
}


@pytest.fixture
def openings(tmp_path):
    path = tmp_path / "openings.jsonl"
    rows = [
        {"lang": lang, "kind": kind, "text": text}
        for lang, kinds in OPENINGS.items()
        for kind, texts in zip(("refuse", "comply"), kinds, strict=True)
        for text in texts
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def patchers(both, module, texts, direction):
    sides = [
        Side(m, SuffixEngine(m.model), ids, [encode(m.tokenizer, p.text) for p in texts])
        for m, ids in ((both.base, both.shared.base_ids), (both.tuned, both.shared.tuned_ids))
    ]
    for side in sides:
        side.read(sorted({Site.parse(s) for s in (*module.sites, *module.sources)}))
    recipient, donor = sides if direction == "into_base" else sides[::-1]
    (prefix_a, suffix_a), (prefix_b, suffix_b) = (
        template_tokens(s.loaded.tokenizer) for s in (recipient, donor)
    )
    common = common_template(prefix_a, prefix_b, suffix_a, suffix_b)
    aligned = [align(a, b, *common) for a, b in zip(recipient.encoded, donor.encoded, strict=True)]
    return Patcher(module, recipient, donor, aligned, direction, 512)


def slow(patcher, index, site, arm, positions):
    """What an arm gives with the whole recipient run under a hook."""
    side, other, module = patcher.recipient, patcher.donor, patcher.module
    where = groups(patcher.aligned[index], side.encoded[index], other.encoded[index])
    if positions == "last":
        where[where != 0] = -1
    source = Site.parse(module.sources[module.sites.index(str(site))])
    whole = arm in ("raw", "real")
    site_read = site if whole else source
    giver = side if patcher.direction == "into_base" and not whole else other
    with record(giver.loaded.model, [site_read]) as seen:
        giver.loaded.model(input_ids=giver.ids(index))
    pairs = patcher.aligned[index]
    donor = torch.zeros(1, len(where), 32)
    at = pairs.positions_a if giver is side else pairs.positions_b
    donor[0, pairs.positions_a] = seen[site_read][0, at]
    if not whole and arm != "self":
        for group in range(3):
            affine = module.affine(module.sites.index(str(site)), group, arm)
            donor[0, where == group] = map_states(donor[0, where == group], affine)
    chosen = (where >= 0)[None] if arm != "self" else torch.zeros(1, len(where), dtype=torch.bool)
    logits = layer_patch_crossmodel(side.loaded.model, side.ids(index), None, site, donor, chosen)
    return side.restricted(logits)[0]


@pytest.mark.parametrize("direction", ["into_tuned", "into_base"])
@pytest.mark.parametrize("sources", [None, ("resid_post.1", "resid_post.3")])
@pytest.mark.parametrize("kind", ["twin", "tuned"])
@torch.no_grad()
def test_arms_equal_the_whole_model_under_a_hook(direction, sources, kind):
    both, texts = pair(loaded(), loaded(**KINDS[kind])), prompts()[::3]
    patcher = patchers(both, maps("random", sources=sources), texts, direction)
    whole = "real" if direction == "into_base" else "raw"
    assert patcher.arms == [whole, "mapped", "shuffled", "mean_shift", "wrong_layer", "self"]
    seen = set()
    for index in patcher.patched("last"):
        for site, found in patcher.last(index):
            for arm, log_p in zip(patcher.arms, found, strict=True):
                torch.testing.assert_close(log_p, slow(patcher, index, site, arm, "last"), atol=1e-5, rtol=0)
    for index, site, found in patcher.everywhere(patcher.patched("all")):
        seen.add((index, site))
        for arm, log_p in zip(patcher.arms, found, strict=True):
            torch.testing.assert_close(log_p, slow(patcher, index, site, arm, "all"), atol=1e-5, rtol=0)
        torch.testing.assert_close(found[-1], patcher.recipient.log_p[index], atol=1e-5, rtol=0)
    assert len(seen) == len(texts) * len(SITES)


@torch.no_grad()
def test_the_identity_maps_to_what_is_there():
    both = pair(loaded(), loaded(seed=1))
    into_tuned = patchers(both, maps(), prompts()[::3], "into_tuned")
    for _, found in into_tuned.last(0):
        assert torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], found[-1])
    into_base = patchers(both, maps(), prompts()[::3], "into_base")
    for _, _, found in into_base.everywhere([0, 1]):
        torch.testing.assert_close(found[1], found[-1], atol=1e-6, rtol=0)
        assert not torch.allclose(found[0], found[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_patches_act_where_maps_are_fitted(tmp_path, kind):
    models, texts = (loaded(), loaded(**KINDS[kind])), prompts()
    spec = ExtractionSpec(str(tmp_path))
    stores = [
        ensure_store(m, texts, [Site(0)], spec, trainer_kwargs={"enable_progress_bar": False}) for m in models
    ]
    rows = join(*stores)
    fitted = {
        (prompt, stores[0].rows.position[i].item()): group
        for i, prompt, group in zip(
            rows.source.tolist(), rows.prompt.tolist(), rows.group.tolist(), strict=True
        )
    }
    patcher = patchers(pair(*models), maps(), texts, "into_base")
    patched = {
        (prompt, position): group
        for prompt, where in enumerate(patcher.where)
        for position, group in enumerate(where.tolist())
        if group >= 0
    }
    assert patched == fitted
    assert len(patcher.patched("last")) == (0 if kind == "raw" else len(texts))


def test_a_copy_has_no_effect(openings):
    both = pair(loaded(), loaded(), openings=openings)
    callback = MappedPatch()
    records = Results(evaluate(callback, maps(), both, prompts()))
    for record_ in records:
        if record_.quantity in ("kl_raw", "kl_mapped"):
            assert record_.value < 1e-10
        elif record_.quantity == "new_token_mass":
            assert record_.value == 0
        elif record_.quantity != "coverage":
            assert record_.reason == "gap_too_small"
    assert {r.quantity for r in records} >= {"kl_reduction", "patch_agreement", "effect_correlation"}
    assert all(item.value < 1e-4 for item in callback.items)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("openings") / "openings.jsonl"
    lines = [
        {"lang": lang, "kind": kind, "text": text}
        for lang, kinds in OPENINGS.items()
        for kind, texts in zip(("refuse", "comply"), kinds, strict=True)
        for text in texts
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    both = pair(loaded(), loaded(**KINDS["tuned"]), openings=str(path))
    callback = MappedPatch(effect_prompts=12, effect_langs=None)
    records = evaluate(callback, maps("random"), both, prompts())
    return both, callback, records


def test_records_say_what_was_measured(measured):
    _, callback, records = measured
    texts = prompts()
    assert len({r.key for r in records}) == len(records)
    found = Results(records)
    controls = {"none", "shuffled", "mean_shift", "wrong_layer"}
    for positions in ("last", "all"):
        for site in SITES:
            cell = {"site": site, "positions": positions}
            assert {r.control for r in found.select(quantity="kl_mapped", **cell)} == {*controls, "self"}
            assert {r.control for r in found.select(quantity="kl_reduction", **cell)} == controls
            assert {r.control for r in found.select(quantity="patch_agreement", **cell)} == controls
            (raw,) = found.select(quantity="kl_raw", **cell)
            (floor,) = found.select(quantity="kl_mapped", control="self", **cell)
            assert floor.value < 1e-9 < raw.value
            (mapped,) = found.select(quantity="kl_mapped", control="none", **cell)
            (reduction,) = found.select(quantity="kl_reduction", control="none", **cell)
            assert reduction.value == pytest.approx(1 - mapped.value / raw.value)
    for r in records:
        assert r.value is None or math.isfinite(r.value)
        if r.quantity.startswith(("kl", "patch")):
            assert r.n == len(texts)
            assert not r.flags
    effects = found.select(quantity="effect_correlation")
    assert [(r.site, r.n, r.control) for r in effects] == [
        (site, 12, control) for site in SITES for control in ("none", "mean_shift")
    ]
    kl = [i for i in callback.items if i.quantity == "kl"]
    assert len(kl) == len(texts) * 2 * 2 * 2 * 6
    raw = [i.value for i in kl if (i.arm, i.site, i.positions) == ("raw", SITES[0], "last")]
    assert sum(raw) / len(raw) == pytest.approx(
        found.select(quantity="kl_raw", site=SITES[0], positions="last")[0].value
    )


def test_divergences_have_their_direction(measured):
    both, callback, _ = measured
    texts = prompts()
    with torch.no_grad():
        tuned, base = (patchers(both, maps("random"), texts, d) for d in ("into_tuned", "into_base"))
        items = {
            (i.prompt, i.site, i.direction, i.arm): i.value for i in callback.items if i.positions == "last"
        }
        for site, found in tuned.last(3):
            expected = kl_divergence(tuned.recipient.log_p[3], found[0]).item()
            assert items[texts[3].id, str(site), "into_tuned", "raw"] == pytest.approx(expected, rel=1e-6)
        for site, found in base.last(3):
            expected = kl_divergence(found[0], found[1]).item()
            assert items[texts[3].id, str(site), "into_base", "mapped"] == pytest.approx(expected, rel=1e-6)
            unpatched = items[texts[3].id, str(site), "into_base", "self"]
            assert unpatched == pytest.approx(kl_divergence(found[0], found[-1]).item(), rel=1e-6)


def test_the_order_of_prompts_changes_no_record(measured):
    both, _, records = measured
    texts = prompts()
    shuffled = [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    assert (
        evaluate(MappedPatch(effect_prompts=12, effect_langs=None), maps("random"), both, shuffled) == records
    )


@torch.no_grad()
def test_refusal_logodds_are_those_of_the_whole_model():
    both, texts = pair(loaded(), loaded(seed=1)), prompts()
    patcher = patchers(both, maps("random"), texts, "into_base")
    model, tokenizer = both.base.model, both.base.tokenizer
    for index in (0, 9):
        kinds = OPENINGS[texts[index].lang]
        ids = patcher.recipient.ids(index)
        for site, found in patcher.graded(index, refusing(kinds)):
            for arm in ("self", "real", "mapped"):
                state = patcher.edited(index, site, arm, "last")
                sums = []
                for text in [t for kind in kinds for t in kind]:
                    follow = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
                    whole = torch.cat([ids, follow], 1)
                    donor = torch.zeros(1, whole.shape[1], 32)
                    donor[0, : len(state)] = state
                    where = torch.zeros(1, whole.shape[1], dtype=torch.bool)
                    where[0, len(state) - 1] = True
                    columns = torch.arange(ids.shape[1] - 1, whole.shape[1] - 1)[None]
                    logits = layer_patch_crossmodel(model, whole, None, site, donor, where, logits_at=columns)
                    sums.append(logits.log_softmax(-1).gather(-1, follow[..., None]).sum())
                expected = logodds(*torch.stack(sums).split([len(kind) for kind in kinds]))
                assert found[arm] == pytest.approx(expected.item(), abs=1e-4)


def test_different_ends_of_the_template(openings):
    both = pair(loaded(), loaded(**KINDS["other_end"]), openings=openings)
    records = Results(evaluate(MappedPatch(), maps(positions=["last", "user"]), both, prompts()))
    assert {r.n for r in records.select(quantity="kl_raw")} == {len(prompts())}
    assert {r.positions for r in records.select(quantity="kl_raw")} == {"last", "all"}


def test_an_unaligned_prompt_is_not_counted():
    both, texts = pair(loaded(), loaded(**KINDS["tuned"])), prompts()
    patcher = patchers(both, maps("random"), texts, "into_tuned")
    none = dataclasses.replace(patcher.recipient.encoded[2], regions=[3] * len(patcher.recipient.encoded[2]))
    ids, other = list(patcher.recipient.encoded), patcher.donor.encoded
    ids[2] = none
    aligned = [align(a, b, 1, 1) for a, b in zip(ids, other, strict=True)]
    again = Patcher(patcher.module, patcher.recipient, patcher.donor, aligned, "into_tuned", 512)
    callback = MappedPatch()
    records = Results(callback._into_tuned(texts, again))
    assert {r.n for r in records} == {len(texts) - 1}
    assert {r.flags for r in records} == {("unaligned_prompts",)}
    assert texts[2].id not in {i.prompt for i in callback.items}


def test_nothing_aligned_is_said(openings):
    both = pair(loaded(), loaded(**KINDS["raw"]), openings=openings)
    records = Results(evaluate(MappedPatch(), maps(), both, prompts()))
    for quantity in ("kl_mapped", "patch_agreement", "effect_correlation"):
        found = records.select(quantity=quantity, positions="last")
        assert {(r.value, r.reason, r.n) for r in found} == {(None, "not_aligned", 0)}
        assert [r.site for r in found] == list(SITES)
    assert {r.n for r in records.select(quantity="kl_raw", positions="all")} == {len(prompts())}


@pytest.mark.parametrize(("known", "measured_at"), [(["last"], {"last"}), (["user"], set())])
def test_only_places_with_a_map_are_patched(known, measured_at):
    both = pair(loaded(), loaded(seed=1))
    records = Results(evaluate(MappedPatch(), maps("random", positions=known), both, prompts()))
    assert {r.positions for r in records.select(quantity="kl_raw")} == measured_at
    missing = records.select(quantity="kl_mapped", reason="not_aligned")
    assert {r.positions for r in missing} == {"last", "all"} - measured_at


def test_sites_inside_a_block_are_sources_only():
    both = pair(loaded(), loaded(seed=1))
    module = maps(sites=("resid_post.1", "attn_out.1"), sources=("head_z.1", "attn_out.1"))
    records = Results(evaluate(MappedPatch(), module, both, prompts()[::4]))
    assert {r.site for r in records if r.site} == {"resid_post.1"}


def test_unequal_widths_have_no_raw_patch():
    both = pair(loaded(), loaded(seed=1))
    narrow = dataclasses.replace(both.base, width=16)
    both.__dict__["base"] = narrow
    records = evaluate(MappedPatch(), maps(), both, prompts()[::4])
    assert not {"kl_raw", "kl_reduction", "patch_agreement"} & {r.quantity for r in records}
    assert Results(records).select(quantity="kl_mapped", control="none")


def test_kept_prompts_and_lost_mass_are_reported():
    both = pair(loaded(), loaded(**KINDS["tuned"]), min_shared_coverage=0.6)
    texts = prompts()
    records = Results(evaluate(MappedPatch(), maps(), both, texts))
    kept = {r.params["lang"]: (r.value, r.n) for r in records.select(quantity="coverage", of="prompts")}
    n = {r.n for r in records.select(quantity="kl_raw")}
    assert 0 < max(n) < len(texts)
    assert n == {round(sum(share * total for share, total in kept.values()))}
    for lang, (share, total) in kept.items():
        assert 0 <= share <= 1
        assert total == sum(p.lang == lang for p in texts)
    lost = records.select(quantity="new_token_mass")
    assert {r.model for r in lost} == {"base", "tuned"}
    plain = [1 - log_p.exp().sum() for log_p in _shared_log_p(both, texts)]
    assert all(0 < mass < 1 for mass in plain)
    found = [r for r in records.select(quantity="new_token_mass", model="tuned")]
    assert (
        min(plain) - 1e-6 <= min(r.value for r in found) <= max(r.value for r in found) <= max(plain) + 1e-6
    )


def _shared_log_p(both, texts):
    """Log-probabilities of the shared tokens in tuned, not renormalised."""
    for p in texts:
        ids = torch.tensor([encode(both.tuned.tokenizer, p.text).input_ids])
        yield run_logits(both.tuned.model, ids)[0].log_softmax(-1)[both.shared.tuned_ids]


def _lines(refusing: int, complying: int) -> list[str]:
    kinds = ["refuse"] * refusing + ["comply"] * complying
    return [f'{{"lang": "en", "kind": "{kind}", "text": "no {n}"}}' for n, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], ":1: expected lang"),
        (["", '{"lang": "en", "kind": "deny", "text": "no"}'], ":2: expected lang"),
        (['{"lang": "en", "kind": "refuse", "text": 3}'], ":1: expected lang"),
        (['{"lang": "en", "kind": "refuse", "text": "no"}'], "both kinds"),
        (
            [
                '{"lang": "en", "kind": "refuse", "text": "no"}',
                '{"lang": "en", "kind": "comply", "text": " "}',
            ],
            "both kinds",
        ),
        (
            _lines(7, 7),
            "has 7 refusing and 7 complying openings for 'en'; allowed: as many of both, 8 or more",
        ),
        (_lines(9, 8), "has 9 refusing and 8 complying"),
    ],
)
def test_bad_openings(tmp_path, lines, message):
    path = tmp_path / "openings.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(PromptError, match=message) as error:
        read_openings(path)
    assert "pair.openings" in str(error.value)
    with pytest.raises(PromptError, match="cannot read"):
        read_openings(tmp_path / "none")


def test_groups_are_positions():
    both = pair(loaded(template=PLAIN), loaded(**KINDS["tuned"]))
    patcher = patchers(both, maps(), prompts(), "into_base")
    for where, encoded in zip(patcher.where, patcher.recipient.encoded, strict=True):
        assert where[-1] == POSITIONS.index("last")
        assert all(g == -1 for g, r in zip(where.tolist(), encoded.regions, strict=True) if r == 0)
