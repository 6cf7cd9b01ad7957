"""Yardsticks: the ends of the line are the models, a system message is read, side effects are exact."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mechdiff.callbacks.side_effects import answer_nats, turned, turned_record
from mechdiff.callbacks.yardsticks import Yardsticks
from mechdiff.errors import ConfigError
from mechdiff.functional.proportions import binomial_interval
from mechdiff.interventions.generation import generate
from mechdiff.pairs.alignment import encode
from mechdiff.results import Record
from tests.callbacks.handles import ALL, measure, pair_of, policy, texts
from tests.toys import loaded, tokenizer

WITH_SYSTEM = (
    "{% for m in messages %}<|{{ 'sys' if m.role == 'system' else 'user' }}|>{{ m.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>answer\n{% endif %}"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    base, tuned, _ = policy()
    fast = tokenizer(300, WITH_SYSTEM)
    base, tuned = replace(base, tokenizer=fast), replace(tuned, tokenizer=fast)
    callback = Yardsticks(lambdas=(0.0, 0.5, 1.0), max_targets=8, max_neutral=6, answer_chars=4)
    pair = pair_of(base, tuned, tmp_path_factory.mktemp("yardsticks"))
    return callback, measure(callback, None, pair, texts("eval")), base


def value(results, quantity, **params):
    (r,) = results.select(quantity=quantity, **params)
    return r


def test_the_ends_of_the_line_are_the_models(found):
    _, results, _ = found
    start, end = ({"edit": "weights", "lambda_": x} for x in (0.0, 1.0))
    for quantity in ("interchange_recovery", "steer_effect"):
        assert value(results, quantity, **start).value == pytest.approx(0, abs=1e-3)
        assert value(results, quantity, **end).value == pytest.approx(1, abs=1e-6)
    assert value(results, "side_effect_bpb", **start).value == pytest.approx(0, abs=1e-5)
    assert value(results, "side_effect_pp", **start).value == 0
    middle = value(results, "interchange_recovery", edit="weights", lambda_=0.5).value
    assert 0 < middle < 1


def test_a_system_message_changes_what_base_says(found):
    callback, results, base = found
    said = value(results, "side_effect_bpb", edit="system_prompt")
    assert said.value != 0
    assert said.n == 6
    plain, asked = (encode(base.tokenizer, "tell me", system) for system in (None, "be kind"))
    assert len(asked) > len(plain)
    assert [r for r in asked.regions if r == 1] == [r for r in plain.regions if r == 1]
    assert asked.input_ids[-5:] == plain.input_ids[-5:]
    names = {(i.prompt, i.quantity, i.arm) for i in callback.items}
    assert len(names) == len(callback.items) == 4 * (8 + 6)


def test_side_effects_carry_their_one_sided_bounds(found):
    _, results, _ = found
    for r in results.select(quantity="side_effect_pp"):
        assert r.low is None
        assert r.high == 100 * binomial_interval(round(r.value * r.n / 100), r.n, side="upper").high
        assert r.flags == ("beyond_bound",)  # six prompts never bound 5 pp
    for r in results.select(quantity="side_effect_bpb"):
        assert r.high >= r.value
    assert len({r.key for r in results}) == len(results)


def test_forty_prompts_without_a_change_are_not_enough():
    about = {"question": "rq3", "params": {}}
    assert turned_record([False] * 40, [False] * 40, about).flags == ("beyond_bound",)
    assert turned_record([False] * 60, [False] * 60, about).flags == ()
    assert turned_record([True] * 60, [True] * 60, about).value == 0  # base did so too


@pytest.mark.parametrize("tokens", [1, 60, 10**6])
def test_nats_of_a_batch_are_those_of_single_answers(tokens):
    base = loaded()
    contexts = [encode(base.tokenizer, p.text).input_ids for p in ALL[::6]]
    answers = generate(base.model, contexts, 5)
    answers[1] = answers[1][:2]
    found = answer_nats(base.model, contexts, answers, tokens_per_batch=tokens)
    for context, answer, nats in zip(contexts, answers, found.tolist(), strict=True):
        ids = torch.tensor([context + answer])
        with torch.no_grad():
            logits = base.model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        assert nats == pytest.approx(-logits[range(len(answer)), answer].sum().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "domain", "is_so"),
    [
        ("I'm sorry, but I can't help with that.", "cultural", True),
        ("Sure, 42.", "cultural", False),
        ("42", "cognitive", True),
        ("1,250.", "cognitive", True),
        ("It is 42.", "cognitive", False),
        ("", "cognitive", False),
    ],
)
def test_what_counts_as_turned(text, domain, is_so):
    assert turned(text, domain) is is_so


def test_weights_are_read_at_the_price_of_a_handle(found, tmp_path):
    _, results, base = found
    cost = value(results, "side_effect_bpb", edit="weights", lambda_=0.5).value
    about = {"question": "rq3", "site": "resid_post.1", "n": 6, "unit": "fraction"}
    cell = {"alpha": 1.0}
    costs = [
        Record(
            quantity="side_effect_bpb", value=x, split="eval", params={**cell, "edit": edit, "k": k}, **about
        )
        for x, edit, k in ((cost, "mapped", 2), (0.0, "add", 1), (9.0, "interchange", 2), (9.0, "mapped", 1))
    ]
    gated = replace(costs[0], value=9.0, params={**costs[0].params, "gate": "linear"})
    chosen = [
        Record(quantity="chosen_handle", value=float(k), split="dev", params={"edit": edit}, **about)
        for edit, k in (("mapped", 2), ("add", 1), ("interchange", 2))
    ]
    base, tuned, _ = policy()
    fast = tokenizer(300, WITH_SYSTEM)
    base, tuned = replace(base, tokenizer=fast), replace(tuned, tokenizer=fast)
    callback = Yardsticks(lambdas=(0.5, 1.0), max_targets=8, max_neutral=6, answer_chars=4)
    callback.earlier = [*costs, gated, *chosen]
    again = measure(callback, None, pair_of(base, tuned, tmp_path), texts("eval"))
    same, nothing = again.select(edit="weights_at_equal_cost")
    assert same.params["handle"] == "mapped, k = 2, α = 1"
    assert same.params["lambda_"] == pytest.approx(0.5)
    half = value(again, "interchange_recovery", edit="weights", lambda_=0.5)
    assert (same.value, same.n, same.site) == (pytest.approx(half.value), half.n, "resid_post.1")
    assert same.low == pytest.approx(half.low, abs=0.01)  # other resamples
    assert same.params["cost_n"] == 6
    assert nothing.params["lambda_"] == pytest.approx(0)
    assert nothing.value == pytest.approx(0, abs=1e-6)
    run = SimpleNamespace(pair=SimpleNamespace(shared=SimpleNamespace(identical=False)), targets=[1, 2])
    seen = SimpleNamespace(log_p=torch.zeros(2, 3).log_softmax(-1), nats=torch.ones(2))
    apart = list(callback._at_equal_cost(run, seen, seen, [(1.0, seen)]))
    assert [(r.value, r.reason, r.n) for r in apart] == [(None, "tokenizers_differ", 2)] * 2


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="max_neutral is 0"):
        Yardsticks(max_neutral=0)
    with pytest.raises(ConfigError, match="system is empty"):
        Yardsticks(system=" ")
