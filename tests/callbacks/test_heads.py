"""Which heads were rewired: planted heads are found, equal models read 0, other models are described."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mechdiff.callbacks.head_cases import find_cases
from mechdiff.callbacks.heads import Heads
from mechdiff.errors import ConfigError, PromptError
from mechdiff.modules import HeadComparison
from mechdiff.pairs.loading import LoadedModel
from mechdiff.pairs.organisms import plant_heads, plant_null
from mechdiff.results import Record, Results
from tests import toys
from tests.callbacks.pairs import pair, prompts
from tests.workspace import OPENINGS

FLIPPED = ((0, 1), (2, 3), (2, 0))
QUICK = {
    "truth_prompts": 4,
    "exact_prompts": 2,
    "graft_prompts": 2,
    "together_prompts": 2,
    "edge_prompts": 6,
    "orders": 2,
}
SMALL = {**QUICK, "top": 4, "drawn": 4, "grafted": 4, "steps": 4, "edge_heads": 4, "nulls": 6}


def run(base: LoadedModel, tuned: LoadedModel, texts: Sequence = (), **options: object) -> Results:
    callback = Heads(**{**SMALL, **options})
    both, texts = pair(base, tuned), texts or prompts(1)
    callback.connect(lambda: both, texts, 17)
    with torch.no_grad():
        found = Results(callback.evaluate(HeadComparison(), both, texts))
    assert len({r.key for r in found}) == len(found)
    assert callback.items
    return found


@cache
def planted() -> Results:
    base = toys.loaded()
    return run(base, plant_heads(base, FLIPPED)[0])


def by_head(results: Results, **where: object) -> dict[str, Record]:
    return {r.params["head"]: r for r in results.select(**where, subset=None) if "head" in r.params}


def first(found: dict[str, Record], count: int = len(FLIPPED)) -> set[str]:
    sizes = {head: abs(r.value or 0.0) for head, r in found.items()}
    return set(sorted(sizes, key=lambda head: -sizes[head])[:count])


NAMES = {f"{layer}.{head}" for layer, head in FLIPPED}


def test_turned_heads_rank_first_by_their_own_change_and_all_others_read_0() -> None:
    for metric, method in (("norm", "own_change"), ("logit_diff", "attribution_patching")):
        about = {"metric": metric, "method": method}
        plain = by_head(planted(), quantity="head_own_change", **about)
        assert len(plain) == 16
        assert first(plain) == NAMES
        assert all(r.value == r.low == r.high == 0 for head, r in plain.items() if head not in NAMES)


def test_turned_heads_rank_first_by_graft_and_others_recover_nothing() -> None:
    found = by_head(planted(), quantity="graft_recovery")
    assert len(found) == 6
    drawn = {head for head, r in found.items() if r.control == "random"}
    assert {head for head, r in found.items() if r.params["group"] == "random"} == drawn
    assert len(drawn) == 2
    assert not drawn & NAMES
    assert first(found) == NAMES
    for head, r in found.items():
        assert r.value is not None
        assert abs(r.value) > 1e-3 if head in NAMES else abs(r.value) < 1e-5
        assert head in r.params["shares_kv"]
    exact = by_head(planted(), quantity="head_own_change", method="patch")
    assert {head for head, r in exact.items() if abs(r.value) > 1e-6} == NAMES
    assert {head for head, r in exact.items() if r.control == r.params["group"] == "random"} == drawn


def test_what_a_head_inherits_is_not_its_own_change() -> None:
    inherited = by_head(planted(), quantity="head_inherited", metric="norm")
    assert all(r.value > 0 for head, r in inherited.items() if head[0] == "3")  # above the turned heads
    assert inherited["0.0"].value == 0


def test_the_difference_of_the_pair_is_tuned_minus_base() -> None:
    for baseline in ("resample", "zero", "mean"):
        about = {"quantity": "head_attribution", "baseline": baseline}
        method = "grad_x_act" if baseline == "zero" else "attribution_patching"
        both, base, tuned = (
            by_head(planted(), model=m, method=method, of=None, **about) for m in ("pair", "base", "tuned")
        )
        assert len(both) == 16
        for head, r in both.items():
            assert r.value == pytest.approx(tuned[head].value - base[head].value, abs=1e-12)
            assert r.low <= r.value <= r.high
            assert r.site == f"head_out.{head[0]}"


def test_every_quantity_of_the_question_has_its_controls() -> None:
    results = planted()
    assert {r.question for r in results} == {"rq4"}
    assert {r.quantity for r in results} == {
        "head_attribution",
        "head_own_change",
        "head_inherited",
        "graft_recovery",
        "completeness_error",
        "churn",
        "churn_bh",
        "churn_p",
        "topk_overlap",
        "jaccard",
        "rbo",
        "cumulative_effect",
        "cpr",
        "cmd",
        "truth_r",
        "truth_overlap",
        "concentration",
    }
    controls = {q: {r.control for r in results.select(quantity=q)} for q in ("churn", "rbo")}
    assert controls == {
        "churn": {"none", "label_swap", "split_half"},
        "rbo": {"none", "chance", "split_half"},
    }
    edges = [r for r in results.select(quantity="churn", of="edges") if r.control == "none"]
    assert {r.params.get("floor_from") for r in edges} == {"seed", "label_swap", "curve", None}
    (noise,) = results.select(control="base_vs_base")
    assert noise.value < 1e-6


def test_the_estimate_agrees_with_exact_exchanges() -> None:
    (r,) = planted().select(quantity="truth_r", model="tuned", baseline="resample", group="all")
    assert r.rows == 8
    assert r.value > 0.8
    found = planted().select(quantity="truth_overlap", model="tuned", baseline="resample")
    assert [(r.params["k"], r.params["among"]) for r in found] == [(4, 8)] * 2


def test_equal_models_read_0_everywhere() -> None:
    base = toys.loaded()
    results = run(base, plant_null(base)[0])
    for quantity in ("churn", "churn_bh", "concentration"):
        assert {r.value for r in results.select(quantity=quantity, control="none")} == {0.0}
    assert {r.value for r in results.select(quantity="head_own_change")} == {0.0}
    assert {r.value for r in results.select(quantity="head_inherited")} == {0.0}
    assert {r.value for r in results.select(quantity="head_attribution", model="pair")} == {0.0}
    assert {r.value for r in results.select(quantity="rbo", control="none")} == {1.0}
    for quantity in ("graft_recovery", "cpr", "cmd"):
        assert {r.reason for r in results.select(quantity=quantity)} == {"gap_too_small"}


def test_rounded_weights_stay_under_the_floor() -> None:
    base = toys.loaded()
    options = {
        "truth_prompts": 0,
        "exact_prompts": 0,
        "integrated_prompts": 0,
        "together_prompts": 0,
        "edge_prompts": 0,
    }
    results = run(base, plant_null(base, "bf16")[0], **options)
    for r in results.select(quantity="churn", floor_from="seed", control="none"):
        assert (r.value, r.high) == (0.0, 0.0)
    assert all(r.value < 0.02 for r in results.select(quantity="head_own_change", metric="norm"))


def test_models_with_other_heads_are_described_but_not_compared() -> None:
    base, tuned = toys.loaded(), toys.loaded(seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tuned.model.config
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 16
        model = type(tuned.model)(config).eval().requires_grad_(False)
    other = LoadedModel(**{**vars(tuned), "model": model, "num_heads": 2, "head_dim": 16})
    results = run(base, other, exact_prompts=0, truth_prompts=0, integrated_prompts=0)
    found = {r.model for r in results.select(quantity="head_attribution", baseline="resample")}
    assert found == {"base", "tuned"}
    assert {r.reason for r in results.select(quantity="churn")} == {"different_heads"}
    (missing,) = results.select(quantity="head_own_change")
    assert missing.reason == "different_heads"


def test_the_churn_of_two_pairs_is_contrasted(tmp_path) -> None:
    quick = dict.fromkeys([*QUICK, "integrated_prompts"], 0) | {"orders": 0}
    base, callback = toys.loaded(), Heads(**{**SMALL, **quick})
    both, texts = pair(base, plant_null(base)[0]), prompts(1)
    callback.connect(lambda: both, texts, 17)
    with torch.no_grad():
        Results(callback.evaluate(HeadComparison(), both, texts)).write(tmp_path / "results.json")
    with pytest.raises(ConfigError, match=r"has no items\.parquet; allowed: the folder of an rq4 run"):
        Heads(contrast=str(tmp_path))
    rows = [asdict(item) for item in callback.items]
    for row in rows:  # as if every head had changed by 1 on every prompt
        row["value"] += row["direction"] == "tuned"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    results = run(base, plant_null(base)[0], contrast=str(tmp_path), **quick)
    (r,) = results.select(quantity="churn_difference")
    assert (r.value, r.low, r.high) == (-1.0, -1.0, -1.0)  # a copied pair has none
    assert r.n == 16  # 8 of each pair
    assert r.flags == ("one_sibling_per_class",)
    assert r.params["floor_from"] == "label_swap"
    theirs, mine = r.params["floors"]  # in the order of `pairs`
    assert 0 < theirs < 1
    assert mine == 0
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "items.parquet")
    with pytest.raises(ConfigError, match="whose models have different heads or none"):
        run(base, plant_null(base)[0], contrast=str(tmp_path), **quick)


def test_too_few_prompts_are_said() -> None:
    base = toys.loaded()
    tuned = plant_heads(base, FLIPPED)[0]
    few = [p for p in prompts(1) if p.lang == "en"][:6]
    options = {
        "integrated_prompts": 0,
        "edge_prompts": 0,
        "together_prompts": 0,
        "exact_prompts": 0,
        "truth_prompts": 0,
    }
    results = run(base, tuned, few, **options)
    assert {r.reason for r in results.select(quantity="churn")} == {"too_few_prompts"}
    with pytest.raises(PromptError, match="1 prompts can be read for logit_diff; allowed: 2 or more"):
        find_cases(pair(base, tuned), [p for p in few if p.label == "neutral"] + few[:1], None, None)


@pytest.mark.parametrize("metric", ["refusal", "kl_other"])
def test_other_numbers(metric: str, tmp_path) -> None:
    base = toys.loaded()
    tuned = plant_heads(base, FLIPPED)[0]
    openings = tmp_path / "openings.jsonl"
    lines = (f'{{"lang": "en", "kind": "{k}", "text": "{t}"}}' for k, t in OPENINGS)
    openings.write_text("\n".join(lines))
    options = {"edge_prompts": 0, "graft_prompts": 0, "exact_prompts": 0, "refusal_heads": 2}
    callback = Heads(metric=metric, **{**SMALL, **options, "refusal_prompts": 6 * (metric == "kl_other")})
    both, texts = pair(base, tuned, openings=str(openings)), [p for p in prompts(2) if p.lang == "en"]
    callback.connect(lambda: both, texts, 17)
    with torch.no_grad():
        results = Results(callback.evaluate(HeadComparison(), both, texts))
    (r,) = results.select(quantity="truth_r", model="tuned", baseline="resample", group="all")
    assert r.value > 0.8
    assert r.params["metric"] == metric
    whole = results.select(quantity="cumulative_effect", of="all_heads", k=16, control="none")
    assert [(r.value, r.params["metric"]) for r in whole] == [(1.0, "kl_other")]  # whatever else is read
    (share,) = results.select(quantity="cumulative_effect", of="gap")
    assert share.value == pytest.approx(1, abs=1e-3)  # nothing but heads differs
    assert {r.control for r in results.select(quantity="cpr")} == {"none", "random"}
    points = results.select(quantity="churn", metric="refusal", floor_from="seed", control="none")
    assert [r.params["floor"] for r in points] == [5.0]
    heads = results.select(quantity="head_attribution", metric="refusal", method="patch", model="pair")
    assert len(heads) == 2 * (metric == "kl_other")
    judged = [r for r in results if r.quantity.startswith("churn") and r.params["method"] == "patch"]
    assert bool(judged) == (metric == "kl_other")
    assert all((r.rows, r.params["group"]) == (2, "attribution") for r in judged)
    assert {r.unit for r in results.select(quantity="head_attribution", metric="refusal")} == {"pp"}


def test_swapped_models_turn_the_difference_and_nothing_else() -> None:
    base = toys.loaded()
    tuned = plant_heads(base, FLIPPED)[0]
    options = dict.fromkeys([*QUICK, "integrated_prompts"], 0) | {"orders": 0}
    about = {"quantity": "head_attribution", "model": "pair"}
    there, back = (by_head(run(*both, **options), **about) for both in ((base, tuned), (tuned, base)))
    assert {head: r.value for head, r in there.items()} == {head: -r.value for head, r in back.items()}
    assert any(r.value for r in there.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "accuracy"}, "metric is 'accuracy'; allowed: logit_diff"),
        ({"exchanges": ["tuned/other"]}, "exchanges has 'tuned/other'; allowed: tuned/other_model"),
        ({"exact_prompts": 1}, "exact_prompts is 1; allowed: 0, or 2 and more"),
        ({"orders": -1}, "orders is -1; allowed: 0 or more"),
        ({"steps": 0}, "steps is 0; allowed: 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Heads(**options)


def test_every_interval_holds_its_estimate() -> None:
    for r in planted():
        if r.low is not None and r.value is not None and r.control == "none":
            assert r.low <= r.value + 1e-12, r
            assert r.high >= r.value - 1e-12, r
