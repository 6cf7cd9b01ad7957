"""A gate: off is base bit for bit, on is unconditional, a mixed batch is separate ones."""

import pytest
import torch

from mechdiff.callbacks.gate import Gate, gated_edit, masked
from mechdiff.callbacks.handle_evaluation import Handle
from mechdiff.callbacks.side_effects import answer_nats
from mechdiff.errors import ConfigError
from mechdiff.interventions.generation import generate
from mechdiff.interventions.hooks import intervene
from mechdiff.interventions.sites import Site
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


@pytest.fixture(scope="module")
def answers(planted):
    contexts = [encode(planted[0].tokenizer, p.text).input_ids for p in ALL[::5]]
    return contexts, generate(planted[0].model, contexts, 4)


def nats(planted, answers, fires, rows=None):
    base, _, module = planted
    rows = range(len(answers[0])) if rows is None else rows

    def edits(batch, where):
        return HANDLE.edits(module, masked(where, torch.tensor([fires[rows[i]] for i in batch])))

    return answer_nats(base.model, *([part[i] for i in rows] for part in answers), edits)


def test_a_gate_that_is_off_is_base_and_one_that_is_on_is_unconditional(planted, answers):
    base, _, module = planted
    n = len(answers[0])
    plain = answer_nats(base.model, *answers)
    assert torch.equal(nats(planted, answers, [False] * n), plain)
    whole = answer_nats(
        base.model, *answers, lambda _, where: module.edits(None, where, site=HANDLE.site, kind="mapped", k=2)
    )
    assert torch.equal(nats(planted, answers, [True] * n), whole)
    assert (whole - plain).abs().max() > 1e-3


def test_a_mixed_batch_is_separate_batches(planted, answers):
    n = len(answers[0])
    fires = [i % 2 == 0 for i in range(n)]
    mixed = nats(planted, answers, fires)
    for state in (True, False):
        rows = [i for i in range(n) if fires[i] is state]
        assert (mixed[rows] - nats(planted, answers, fires, rows)).abs().max() < 1e-4
    plain = answer_nats(planted[0].model, *answers)
    spared = [i for i in range(n) if not fires[i]]
    assert torch.equal(mixed[spared], plain[spared])


def test_a_decision_is_kept_while_decoding(planted):
    """The library's own loop keeps every row in the batch."""
    base, _, module = planted
    ids = torch.randint(5, 290, (4, 9), generator=torch.Generator().manual_seed(0))
    fires = torch.tensor([True, False, True, False])

    def decode(edits):
        with intervene(base.model, edits), torch.no_grad():
            out = base.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        return torch.stack(out.logits, 1)

    plain = decode({})
    whole = decode({HANDLE.site: gated_edit(module, HANDLE, None)})
    mixed = decode({HANDLE.site: gated_edit(module, HANDLE, fires)})
    assert torch.equal(mixed[~fires], plain[~fires])
    assert torch.equal(mixed[fires], whole[fires])
    assert not torch.equal(whole[fires], plain[fires])


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
