import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from mechdiff.errors import FitError
from mechdiff.functional.overlap import (
    chance_jaccard,
    chance_overlap,
    chance_rbo,
    correlation_of_means,
    jaccard,
    ranking_agreement,
    ranks,
    rbo,
    topk_overlap,
)
from mechdiff.functional.stats import generator


def normal(*shape, name="overlap"):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, name, shape))


def by_hand(first, second, p):
    """Rank-biased overlap from sets, depth by depth, far beyond the last head."""
    lists = [sorted(range(len(x)), key=lambda i, x=x: -abs(x[i])) for x in (first, second)]
    agreement = [len(set(lists[0][:d]) & set(lists[1][:d])) / min(d, len(first)) for d in range(1, 2000)]
    return (1 - p) * sum(p ** (d - 1) * a for d, a in enumerate(agreement, 1))


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_rank_biased_overlap_is_its_definition(p):
    first, second = normal(40, name="a"), normal(40, name="b")
    second = second + 0.8 * first
    assert rbo(first, second, p).item() == pytest.approx(
        by_hand(first.tolist(), second.tolist(), p), abs=1e-12
    )


def test_sets_are_those_of_python():
    first, second = normal(30, name="a"), normal(30, name="b")
    for k in (1, 7, 30):
        tops = [set(x.abs().argsort(descending=True)[:k].tolist()) for x in (first, second)]
        common, all_ = len(tops[0] & tops[1]), len(tops[0] | tops[1])
        assert topk_overlap(first, second, k).item() == pytest.approx(common / k)
        assert jaccard(first, second, k).item() == pytest.approx(common / all_)


def test_ties_are_all_in_and_no_order_is_made_up():
    tied = torch.tensor([5.0, 1.0, -1.0, 1.0, 0.0])
    assert ranks(tied).tolist() == [0, 1, 1, 1, 4]
    other = torch.tensor([5.0, 1.0, 0.5, 0.2, 0.0])
    # the first two of `tied` are four heads, of which `other` holds two
    assert topk_overlap(tied, other, 2).item() == pytest.approx(2 * 2 / (4 + 2))
    assert jaccard(tied, other, 2).item() == pytest.approx(2 / 4)
    for measure in (lambda a, b: topk_overlap(a, b, 2), lambda a, b: jaccard(a, b, 2), rbo):
        assert measure(tied, tied).item() == pytest.approx(1.0)
        assert measure(torch.zeros(5), torch.zeros(5)).item() == pytest.approx(1.0)
        flipped = measure(tied.flip(0), other.flip(0))
        assert flipped.item() == pytest.approx(measure(tied, other).item())


@pytest.mark.parametrize(("heads", "k"), [(270, 20), (24, 5), (10, 8), (6, 6)])
def test_chance_is_exact(heads, k):
    law = reference.hypergeom(heads, k, k)
    found = chance_overlap(heads, k)
    assert found.value == pytest.approx(k / heads)
    assert (found.low, found.high) == pytest.approx((law.ppf(0.025) / k, law.ppf(0.975) / k))
    assert chance_jaccard(heads, k).value == pytest.approx(law.expect(lambda x: x / (2 * k - x)))


def test_chance_is_what_random_orders_give():
    first, second = normal(4000, 60, name="a"), normal(4000, 60, name="b")
    assert topk_overlap(first, second, 12).mean().item() == pytest.approx(
        chance_overlap(60, 12).value, abs=0.01
    )
    assert jaccard(first, second, 12).mean().item() == pytest.approx(chance_jaccard(60, 12).value, abs=0.01)
    assert rbo(first, second).mean().item() == pytest.approx(chance_rbo(60), abs=0.01)
    assert rbo(first, second, 0.99).mean().item() == pytest.approx(chance_rbo(60, 0.99), abs=0.01)


def test_identical_models_agree_fully_and_unlike_ones_by_chance():
    table = normal(20, 50)
    same = ranking_agreement(table, table, [5, 20], generator=generator(1), draws=100)
    assert torch.cat([torch.stack(part[:3]).flatten() for part in same]) == pytest.approx(1.0)
    apart = ranking_agreement(table, normal(20, 50, name="other"), [5, 20], generator=generator(1))
    assert apart.overlap.value[1] < 0.7
    assert apart.overlap.low[1] <= chance_overlap(50, 20).value <= apart.overlap.high[1]


def test_intervals_of_overlaps_hold_the_overlap_expected_at_their_size():
    truth = torch.linspace(0, 1, 40, dtype=torch.float64)
    found = []
    for i in range(100):
        first, second = (truth + 1.5 * normal(24, 40, name=(i, side)) for side in "ab")
        found.append(ranking_agreement(first, second, [8], generator=generator(2, i), draws=150))
    for part in ("overlap", "jaccard", "rbo"):
        intervals = [getattr(f, part) for f in found]
        expected = torch.stack([i.value for i in intervals]).mean()
        covered = sum(bool(i.low[0] <= expected <= i.high[0]) for i in intervals)
        assert covered >= 92


def test_correlation_is_over_heads_and_its_interval_over_prompts():
    heads = normal(1, 64, name="heads")
    estimate = heads + 0.3 * normal(32, 64, name="estimate")
    truth = heads + 0.3 * normal(32, 64, name="truth")
    found = correlation_of_means(estimate, truth, generator=generator(3))
    assert found.value == pytest.approx(reference.pearsonr(estimate.mean(0), truth.mean(0)).statistic)
    assert found.low < found.value < found.high
    assert found.n == 32
    with pytest.raises(FitError, match="64 heads is undefined"):
        correlation_of_means(estimate, torch.ones(32, 64), generator=generator(3))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_neither_prompts_nor_heads_have_an_order(seed):
    first, second = normal(9, 12, name=("a", seed)), normal(9, 12, name=("b", seed))
    rows, heads = (torch.randperm(n, generator=generator(seed, n)) for n in (9, 12))

    def answers(a, b):
        return torch.cat(
            [
                torch.stack(p[:3]).flatten()
                for p in ranking_agreement(a, b, [3], generator=generator(4), draws=40)
            ]
        )

    assert torch.allclose(answers(first[rows], second[rows]), answers(first, second), atol=1e-12)
    assert torch.allclose(answers(first[:, heads], second[:, heads]), answers(first, second), atol=1e-12)


def test_more_heads_than_there_are_cannot_be_compared():
    with pytest.raises(FitError, match="k is 5; allowed: 1 to 4"):
        ranking_agreement(normal(6, 4), normal(6, 4), [5], generator=generator(5))
