"""Transfer as a callback: a language's own direction does not work for another, unless both were fitted."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from mechdiff.callbacks.handle_evaluation import same_end, two_engines, two_sides
from mechdiff.callbacks.transfer import PLAIN, Transfer
from mechdiff.errors import ConfigError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.steering import paired_svd
from mechdiff.interventions.sites import Site
from tests.callbacks.handles import ALL, SITES, measure, pair_of, policy, stored, subspaces, texts
from tests.toys import loaded


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    base, tuned, _ = policy()
    russian = [
        asdict(replace(p, id=f"ru-{p.id}", lang="ru", split="eval", text=f"{p.text} ?"))
        for p in ALL
        if p.lang == "kk"
    ]
    extra = folder / "ru.jsonl"
    extra.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in russian), encoding="utf-8")
    callback = Transfer(k=1, extra_prompts=[str(extra)], max_prompts=8, template_prompts=4, graded_prompts=2)
    callback.data = stored(base, tuned)
    pair = pair_of(base, tuned, folder)
    return callback, measure(callback, subspaces(base, tuned), pair, texts("eval"))


def value(results, fitted_on, lang, **cell):
    usual = {
        "edit": "interchange",
        "site": SITES[0],
        "template": PLAIN,
        "metric": "recovery",
        "masking": True,
    }
    about = {**usual, "fitted_on": fitted_on, "lang": lang, **cell}
    (r,) = results.select(quantity="transfer_effect", **about)
    return r


def test_a_direction_works_for_its_own_language_alone(found):
    _, results = found
    for lang, other in (("kk", "en"), ("en", "kk")):
        assert value(results, lang, lang).value > 0.95
        assert value(results, other, lang).value < 0.5
        assert value(results, lang, lang).params["fit_prompts"] == 8
    assert value(results, "kk", "ru").value > value(results, "en", "ru").value  # words in common
    random = value(results, "random", "kk")
    assert random.control == "random"
    assert random.params["draws"] == 100
    assert random.low <= random.value <= random.high < 0.5


def test_recovery_is_that_of_an_edit_made_by_hand(found):
    _, results = found
    base, tuned, _ = policy()
    chosen = [p for p in texts("eval") if p.label == "target" and p.lang == "kk"]
    a, b = two_sides(pair_of(base, tuned), chosen, two_engines(pair_of(base, tuned)))
    assert all(same_end(a, b))
    site = Site.parse(SITES[0])
    a.read([site])
    b.read([site])
    change = torch.stack([y[site][-1] - x[site][-1] for x, y in zip(a.states, b.states, strict=True)])
    unit = paired_svd(change, 1).basis.float()
    left, gap = 0.0, 0.0
    for i in range(len(chosen)):
        h, other = a.states[i][site][-1:], b.states[i][site][-1:]
        hidden = (h + (other - h) @ unit.T @ unit)[None]
        logits = a.engine.resume(site.layer, hidden, a.ids(i)[:, -1:], prefix=a.prefixes[i])
        left += kl_divergence(b.log_p[i], a.restricted(logits)[0]).item()
        gap += kl_divergence(b.log_p[i], a.log_p[i]).item()
    assert len(chosen) == 8
    assert value(results, "kk", "kk").value == pytest.approx(1 - left / gap, abs=1e-4)


def test_every_cell_is_there_once(found):
    callback, results = found
    keys = [r.key for r in results]
    assert len(set(keys)) == len(keys)
    cells = len(SITES) * 3 * len(callback.templates) * (3 * 2 + 2)
    assert len(results.select(metric="recovery")) == cells
    graded = results.select(metric="refusal_logodds")
    assert {r.params["lang"] for r in graded} == {"en", "kk"}
    assert {r.params["masking"] for r in graded} == {True, False}
    for r in graded:  # one vocabulary: masking takes nothing away
        other = value(results, **{**r.params, "masking": not r.params["masking"]}, site=r.site)
        assert r.value is None or r.value == pytest.approx(other.value, abs=1e-6)
    names = {(i.prompt, i.quantity, i.site, i.arm) for i in callback.items}
    assert len(names) == len(callback.items)


def test_a_pair_without_a_difference_says_so(tmp_path):
    base = loaded()
    callback = Transfer(k=1, max_prompts=4, graded_prompts=2, templates=())
    callback.data = stored(base, base)
    results = measure(callback, subspaces(base, base), pair_of(base, base, tmp_path), texts("eval"))
    assert {r.reason for r in results.select(quantity="transfer_effect")} == {"gap_too_small"}


def test_a_language_with_too_few_prompts_is_named():
    base, tuned, _ = policy()
    callback = Transfer(k=9, max_prompts=2, graded_prompts=0, templates=())
    callback.data = stored(base, tuned)
    results = measure(callback, subspaces(base, tuned, k=9), pair_of(base, tuned), texts("eval"))
    assert {r.params["fitted_on"] for r in results.select(reason="too_few_prompts")} == {"kk", "en"}
    assert {r.params["fitted_on"] for r in results if r.value is not None} == {"all", "random"}
    whole = value(results, "all", "en")
    assert whole.value > 0.9


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"edits has 'add'"):
        Transfer(edits=("add",))
    with pytest.raises(ConfigError, match=r"no place for the message"):
        Transfer(templates=("text",))
    with pytest.raises(ConfigError, match=r"draws is 1; allowed: 20 or more"):
        Transfer(draws=1)
    with pytest.raises(ConfigError, match=r"needs the activations"), torch.no_grad():
        list(Transfer().evaluate(None, None, []))
