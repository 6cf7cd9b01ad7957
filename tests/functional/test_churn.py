import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechdiff.config import HEAD_ABS_DELTA_NAT
from mechdiff.errors import FitError
from mechdiff.functional.churn import (
    churn_contrast,
    churn_shares,
    head_churn,
    nearest,
    shares,
    split_half_shares,
    swapped_shares,
)
from mechdiff.functional.intervals import bootstrap_means
from mechdiff.functional.stats import generator

HEADS = 270


def normal(rows, heads, *names):
    return torch.randn(rows, heads, dtype=torch.float64, generator=generator(0, "churn", *names))


def test_identical_models_read_exactly_zero():
    table = normal(24, HEADS, "same")
    churn = head_churn(table, table.clone(), generator=generator(1))
    assert churn.floor == 0
    for numbers in (*churn.difference[:3], churn.bound, churn.z):
        assert numbers.eq(0).all()
    assert churn.p_max.eq(1).all()
    assert churn.p_bh.eq(1).all()
    found = churn_shares(table - table, [0.0, HEAD_ABS_DELTA_NAT], generator=generator(1))
    assert torch.stack(found[:3]).eq(0).all()
    null = swapped_shares(table - table, [0.0], generator=generator(1), draws=3)
    assert null.mean.eq(0).all()
    assert churn_contrast(table - table, table - table, (0.0, 0.0), generator=generator(1))[:3] == (0, 0, 0)


def test_planted_heads_and_only_they_churn():
    base = normal(32, HEADS, "base")
    noise = 0.05 * normal(32, HEADS, "noise")
    tuned = base + noise
    planted = torch.tensor([3, 77, 200])
    tuned[:, planted] += torch.tensor([0.8, -0.7, 0.6], dtype=torch.float64)
    churn = head_churn(base, tuned, generator=generator(2))
    for heads in (churn.bound > HEAD_ABS_DELTA_NAT, churn.bound > churn.floor, churn.p_max <= 0.05):
        assert heads.nonzero()[:, 0].tolist() == planted.tolist()
    assert (churn.p_bh[planted] <= 0.05).all()
    assert churn.difference.value[planted].sign().tolist() == [1, -1, 1]
    back = head_churn(tuned, base, generator=generator(2))
    assert torch.allclose(back.difference.value, -churn.difference.value)
    assert back.p_max.tolist() == pytest.approx(churn.p_max.tolist(), abs=0.02)


def test_the_bound_is_the_end_nearer_to_zero():
    d = normal(20, 40, "bound") + 0.5
    interval = bootstrap_means(d, generator=generator(3))
    bound = nearest(interval)
    for low, high, least in zip(interval.low, interval.high, bound, strict=True):
        assert least == (low if low > 0 else -high if high < 0 else 0)


def test_two_halves_of_one_model_give_the_known_share():
    pairs = torch.stack(
        [shares(normal(64, HEADS, i), [], generator=generator(4), draws=2) for i in range(200)]
    )
    assert pairs.mean().item() == pytest.approx(0.05, abs=0.004)
    assert pairs.quantile(0.95).item() == pytest.approx(0.07, abs=0.008)
    halves = split_half_shares(normal(128, HEADS, "halves"), [0.0, 9.0], generator=generator(4), draws=30)
    assert halves.mean[[0, 2]].tolist() == pytest.approx([0.055, 0.05], abs=0.015)
    assert halves.mean[1] == 0
    assert (halves.low <= halves.mean).all()
    assert (halves.mean <= halves.high).all()


def test_swapped_labels_give_the_share_of_a_null_and_keep_the_size_of_heads():
    d = normal(40, HEADS, "swap") + (torch.arange(HEADS) < 100) * 2.0
    null = swapped_shares(d, [0.0, 0.5], generator=generator(5), draws=30)
    assert null.mean[[0, 2]].tolist() == pytest.approx([0.05, 0.05], abs=0.02)
    assert shares(d, [0.5], generator=generator(5))[0] == pytest.approx(100 / HEADS)
    assert null.mean[1] < 0.05


def test_z_grows_with_prompts_while_a_floor_does_not():
    few, many = (
        shares(0.2 + normal(n, HEADS, "growth"), [0.5], generator=generator(6), draws=200) for n in (16, 900)
    )
    assert few[1] < 0.4
    assert many[1] > 0.99
    assert max(few[0], many[0]) < 0.02


def test_intervals_of_shares_cover_where_percentiles_fail():
    """The share of heads beyond a floor is larger in a resample, which carries the noise twice."""
    loads = normal(3, 60, "loads")
    means = torch.linspace(-0.6, 0.6, 60, dtype=torch.float64)
    found, plain = [], []
    for i in range(120):
        d = means + normal(24, 60, "own", i) + 0.4 * normal(24, 3, "common", i) @ loads
        found.append(churn_shares(d, [0.05], generator=generator(7, i), draws=200))
        resampled = d[torch.randint(24, (200, 24), generator=generator(8, i))]
        z = (resampled.mean(1).abs() - 0.05) / (resampled.std(1) / 24**0.5)
        plain.append((z > 1.96).double().mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)))
    truth = torch.stack([f.value[0] for f in found]).mean()
    covered = sum(bool(f.low[0] <= truth <= f.high[0]) for f in found) / 120
    assert covered >= 0.93
    assert sum(bool(low <= truth <= high) for low, high in plain) / 120 < covered - 0.05


def test_contrast_of_two_pairs():
    first = normal(30, 100, "first") * 0.1
    second = normal(50, 90, "second") * 0.1 + (torch.arange(90) < 30) * 1.0
    found = churn_contrast(first, second, (0.5, 0.5), generator=generator(9))
    assert found.value == pytest.approx(1 / 3)
    assert found.low > 0
    assert found.n == 80
    back = churn_contrast(second, first, (0.5, 0.5), generator=generator(9))
    assert back.value == -found.value
    null = churn_contrast(first, 0.1 * normal(40, 100, "other"), (0.0, 0.0), generator=generator(9))
    assert null.low <= 0 <= null.high


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_prompts_may_be_permuted_and_heads_permute_with_their_results(seed):
    base, tuned = normal(9, 7, "b", seed), normal(9, 7, "t", seed)
    rows, heads = (torch.randperm(n, generator=generator(seed, n)) for n in (9, 7))

    def answers(b, t):
        churn = head_churn(b, t, generator=generator(10), draws=60)
        ends = torch.stack([*churn.difference[:3], churn.bound, churn.z, churn.p_max, churn.p_bh])
        found = churn_shares(t - b, [churn.floor], generator=generator(10), draws=60)
        return ends, torch.tensor([churn.floor]), torch.stack(found[:3])

    whole = answers(base, tuned)
    for ours, theirs in zip(answers(base[rows], tuned[rows]), whole, strict=True):
        assert torch.equal(ours, theirs)
    ends, floor, found = answers(base[:, heads], tuned[:, heads])
    assert torch.allclose(ends, whole[0][:, heads], rtol=1e-9, atol=1e-12)
    assert torch.allclose(floor, whole[1], rtol=1e-12)
    assert torch.allclose(found, whole[2], atol=1e-12)


def test_too_few_prompts_are_refused():
    with pytest.raises(FitError, match="at least 4"):
        split_half_shares(torch.ones(3, 2), [0.0], generator=generator(11))
    with pytest.raises(FitError, match="1 prompts are too few"):
        head_churn(torch.ones(1, 2), torch.ones(1, 2), generator=generator(11))
