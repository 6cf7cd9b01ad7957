"""Numbers of heads from given tables: no sign by choice, equal terms, and gaps of either sign."""

from types import SimpleNamespace

import pytest
import torch

from mechdiff.callbacks.head_cases import contrast_tokens
from mechdiff.callbacks.head_records import HeadRecords
from mechdiff.callbacks.head_tables import Tables
from mechdiff.callbacks.head_truth import HeadTruth
from mechdiff.functional.permutation import sign_flip
from mechdiff.results import Results


def test_the_tokens_of_the_difference() -> None:
    base, tuned = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.3, 0.6]).log()
    assert contrast_tokens(base, tuned) == contrast_tokens(tuned, base) == (2, 0)
    assert contrast_tokens(base, base) == (0, 1)


def test_p_of_exchangeable_models_is_calibrated() -> None:
    draws, found = torch.Generator().manual_seed(17), []
    for _ in range(12):  # logits are sums over heads, each model's a draw of the same kind on every prompt
        common = torch.randn(24, 30, 40, generator=draws, dtype=torch.float64)
        models = [common + torch.randn(common.shape, generator=draws, dtype=torch.float64) for _ in range(2)]
        log_p = [m.sum(1).log_softmax(-1) for m in models]
        tokens = [contrast_tokens(one, other) for one, other in zip(*log_p, strict=True)]
        base, tuned = (
            torch.stack([z[:, plus] - z[:, minus] for z, (plus, minus) in zip(m, tokens, strict=True)])
            for m in models
        )
        found.append(sign_flip(tuned - base, generator=draws).p)
    assert 0.02 < (torch.cat(found) <= 0.05).double().mean() < 0.08


def test_halves_of_prompts_are_ranked_at_equal_terms() -> None:
    table = torch.randn(9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    records = HeadRecords(SimpleNamespace(metric="logit_diff"), Tables({}, {}), 17, nulls=20)
    for tuned in (table, -table.flip(1)):
        found = Results(records.rankings(table, tuned, "twin"))
        for quantity in ("topk_overlap", "jaccard", "rbo"):
            where = {"quantity": quantity, "control": "split_half", "k": None if quantity == "rbo" else 5}
            (base,), (pair,) = (found.select(model=m, **where) for m in ("base", "pair"))
            assert base.n == pair.n == 4
            assert (base.value == pair.value) == (tuned is table)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_shares_of_the_effect_of_all_heads_do_not_hang_on_its_sign(sign: float) -> None:
    records = HeadRecords(SimpleNamespace(metric="refusal"), Tables({}, {}), 17)
    none = torch.tensor([3.0, 4.0, 3.0, 4.0], dtype=torch.float64)
    gap = none * (sign or torch.tensor([1.0, -1.0, 1.0, -1.0]))
    shares = torch.tensor([[0.5, 0.8], [0.2, 0.8]])  # in order and at random, of 1 and of 2 heads
    curves = none[:, None, None] - gap[:, None, None] * shares
    truth = HeadTruth(records, {}, lambda steps, _: steps)
    found = Results(truth._curves(none, curves, (1, 2), 0.01, ()))
    (effect,) = found.select(of="effect")
    assert (effect.unit, effect.params["metric"]) == ("nats", "kl_other")
    shares = {of: [r.value for r in found.select(of=of, control="none")] for of in ("all_heads", "gap")}
    if sign:
        assert effect.value == pytest.approx(sign * 2.8)
        assert shares == {"all_heads": pytest.approx([0.625, 1.0]), "gap": pytest.approx([sign * 0.8])}
    else:
        assert {r.reason for r in found if r is not effect} == {"gap_too_small"}
