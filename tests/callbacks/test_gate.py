"""A gate: it keeps the effect, spares neutral prompts, and answers are edited as they are scored."""

import pytest
import torch

from mechdiff.callbacks.gate import Gate, everywhere
from mechdiff.callbacks.handle_evaluation import Handle
from mechdiff.errors import ConfigError
from mechdiff.interventions.generation import generate
from mechdiff.interventions.hooks import intervene
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.modules.base import UNTOUCHED
from mechdiff.pairs.alignment import encode
from mechdiff.results import Record
from tests.callbacks.handles import ALL, SITES, measure, pair_of, policy, stored, subspaces, texts
from tests.toys import loaded

SIZES = {
    "max_targets": 8,
    "max_neutral": 8,
    "answer_chars": 4,
    "tokens_per_batch": 200,
}
HANDLE = Handle(Site.parse(SITES[0]), "mapped", 2, 1.0)


@pytest.fixture(scope="module")
def planted():
    base, tuned, _ = policy()
    return base, tuned, subspaces(base, tuned)


@pytest.fixture(scope="module")
def found(planted):
    base, tuned, module = planted
    callback = Gate(**SIZES)
    callback.data = stored(base, tuned)
    return callback, measure(callback, module, pair_of(base, tuned), texts("dev", "eval"))


def test_answers_are_edited_on_the_last_token_of_every_forward(planted):
    base, _, module = planted
    contexts = [encode(base.tokenizer, p.text).input_ids for p in ALL[::5]]
    with intervene(base.model, {HANDLE.site: everywhere(module, HANDLE)}):
        said = generate(base.model, contexts, 4)
    assert said != generate(base.model, contexts, 4)
    for context, answer in zip(contexts, said, strict=True):
        for place, token in enumerate(answer):
            ids = torch.tensor([[*context, *answer[:place]]])
            where = torch.full(ids.shape, UNTOUCHED)
            where[:, len(context) - 1 :] = POSITIONS.index("last")
            with intervene(base.model, HANDLE.edits(module, where)), torch.no_grad():
                assert int(base.model(ids).logits[0, -1].argmax()) == token


def value(results, quantity, gate, **more):
    (r,) = results.select(quantity=quantity, gate=gate, **more)
    return r


def test_a_gate_keeps_the_effect_and_spares_neutral_prompts(found):
    callback, results = found
    fired = {
        g: {x: value(results, "gated_effect", g, metric="fires", label=x) for x in ("target", "neutral")}
        for g in ("linear", "shuffled")
    }
    assert fired["linear"]["target"].value >= 0.9
    assert fired["linear"]["neutral"].value < fired["shuffled"]["neutral"].value
    whole, gated = (value(results, "gated_effect", g, metric="recovery") for g in ("none", "linear"))
    assert whole.value > 0.5
    assert gated.value > 0.8 * whole.value
    assert {(r.flags[0], r.params["not_chosen"]) for r in results} == {("not_chosen", "no_steering")}
    apart = value(results, "gated_effect", "linear", metric="recovery_difference")
    assert apart.value == pytest.approx(gated.value - whole.value, abs=1e-9)
    costs = {g: value(results, "side_effect_bpb", g) for g in ("none", "linear", "shuffled")}
    assert abs(costs["linear"].value) <= abs(costs["none"].value)
    assert costs["shuffled"].control == "shuffled"
    assert value(results, "side_effect_pp", "linear").value <= value(results, "side_effect_pp", "none").value
    assert len({r.key for r in results}) == len(results) == 4 + 3 + 2 + 6
    names = {(i.prompt, i.quantity, i.arm) for i in callback.items}
    assert len(names) == len(callback.items)


def test_the_handle_is_the_one_that_the_run_chose(planted):
    callback = Gate()
    module = planted[2]
    assert callback.handle(module, "mapped", None, None) == Handle(Site(2), "mapped", 2, 1.0, "paired_svd")
    params = {"edit": "mapped", "alpha": 0.5, "solver": "paired_svd"}
    about = {"site": SITES[0], "params": params, "split": "dev"}
    callback.earlier = [Record("rq3", "chosen_handle", 1.0, 8, "directions", **about)]
    assert callback.handle(module, "mapped", None, None) == Handle(Site(1), "mapped", 1, 0.5, "paired_svd")
    assert "flags" not in callback.about(HANDLE, "last")
    assert callback.handle(module, "mapped", 2, 0.0) == Handle(Site(1), "mapped", 2, 0.0, "paired_svd")
    assert callback.handle(module, "amplify", None, None).alpha == 1.0
    callback.earlier = [
        Record("rq3", "chosen_handle", None, 8, "directions", reason="none_feasible", **about)
    ]
    assert callback.handle(module, "mapped", None, None).site == Site(2)
    assert callback.about(HANDLE, "last")["params"]["not_chosen"] == "none_feasible"
    with pytest.raises(ConfigError, match="k is 3; allowed: 1 to 2"):
        callback.handle(module, "mapped", 3, None)


def test_a_pair_without_a_difference_says_so():
    base = loaded()
    callback = Gate(**SIZES)
    callback.data = stored(base, base)
    results = measure(callback, subspaces(base, base), pair_of(base, base), texts("dev", "eval"))
    assert {r.reason for r in results.select(metric="recovery")} == {"gap_too_small"}
    assert {r.value for r in results if r.quantity == "side_effect_pp"} == {0.0}


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="kind is 'interchange'"):
        Gate(kind="interchange")
    with pytest.raises(ConfigError, match="keep is 0"):
        Gate(keep=0)
    with pytest.raises(ConfigError, match="answer_chars is 0"):
        Gate(answer_chars=0)
