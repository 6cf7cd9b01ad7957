from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from mechdiff.errors import FitError
from mechdiff.functional.permutation import FEWEST, benjamini_hochberg, label_shuffle, sign_flip, swap_floor
from mechdiff.functional.stats import generator


def differences(rows, heads, name="d"):
    return torch.randn(rows, heads, dtype=torch.float64, generator=generator(0, name, rows, heads))


def by_hand(d):
    """Try every pattern of signs with Student's t."""
    n = len(d)

    def t(values):
        return np.abs(values.mean(0) / (values.std(0, ddof=1) / np.sqrt(n)))

    seen = t(d)
    flips = np.array([t(d * np.array(signs)[:, None]) for signs in product((1, -1), repeat=n)])
    close = 1 - 1e-9
    return (flips >= seen * close).mean(0), (flips.max(1)[:, None] >= seen * close).mean(0)


@pytest.mark.parametrize("n", [3, 7, 9])
def test_all_patterns_are_tried_with_students_t(n):
    d = differences(n, 5) + torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0])
    found = sign_flip(d, generator=generator(1))
    single, family = by_hand(d.numpy())
    assert found.draws == 2 ** (n - 1)
    assert found.p.tolist() == pytest.approx(single.tolist())
    assert found.p_max.tolist() == pytest.approx(family.tolist())


def test_p_agrees_with_scipy():
    d = differences(10, 4) + 0.6
    found = sign_flip(d, generator=generator(2))
    for head in range(4):
        theirs = reference.permutation_test(
            (d[:, head].numpy(),), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert found.p[head].item() == pytest.approx(theirs.pvalue)


def test_random_patterns_approach_all_of_them():
    d = differences(12, 6) + 0.4
    every = sign_flip(d, generator=generator(3))
    some = sign_flip(d, generator=generator(3), draws=2000)
    assert (every.draws, some.draws) == (2048, 2000)
    assert some.p.tolist() == pytest.approx(every.p.tolist(), abs=0.03)
    assert some.p_max.tolist() == pytest.approx(every.p_max.tolist(), abs=0.03)
    assert some.p.min() >= 1 / 2001  # never 0: the pattern that was seen counts


def test_heads_of_unlike_scale_are_alike():
    d = differences(9, 3)
    assert sign_flip(d * torch.tensor([1.0, 1e-6, 1e6]), generator=generator(4)).p_max.tolist() == (
        sign_flip(d, generator=generator(4)).p_max.tolist()
    )


def test_family_wise_errors_keep_their_rate_among_dependent_heads():
    hits = 0
    for trial in range(300):
        common = differences(16, 3, ("common", trial)) @ differences(3, 30, "loads")
        d = common + differences(16, 30, ("own", trial))
        hits += bool((sign_flip(d, generator=generator(5, trial), draws=200).p_max <= 0.05).any())
    assert 0.02 <= hits / 300 <= 0.085


def test_too_few_prompts_cannot_reject():
    for n, reachable in ((FEWEST - 1, False), (FEWEST, True)):
        certain = torch.ones(n, 1)
        assert (sign_flip(certain, generator=generator(6)).p.item() <= 0.05) is reachable


def test_default_draws_suffice_for_the_strictest_step():
    d = torch.zeros(40, 300)
    d[:, 7] = 1.0
    found = sign_flip(d, generator=generator(7))
    assert benjamini_hochberg(found.p)[7] <= 0.05
    assert found.p[torch.arange(300) != 7].unique().tolist() == [1.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-6, 0.01, 0.02, 0.04, 0.3, 0.9, 1.0]), min_size=1, max_size=30))
def test_adjusted_p_agree_with_scipy(p):
    ours = benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    assert ours.tolist() == pytest.approx(reference.false_discovery_control(p).tolist())


def test_the_floor_is_what_swapped_labels_reach():
    d = differences(8, 20)
    means = np.abs([(d.numpy() * np.array(s)[:, None]).mean(0) for s in product((1, -1), repeat=8)])
    floor = swap_floor(d, generator=generator(8), draws=20_000)
    assert floor == pytest.approx(np.quantile(means, 0.95), rel=0.02)
    assert swap_floor(3 * d, generator=generator(8)) == pytest.approx(
        3 * swap_floor(d, generator=generator(8))
    )
    assert swap_floor(0 * d, generator=generator(8)) == 0


def test_blocks_change_nothing(monkeypatch):
    d = differences(9, 4)
    whole = sign_flip(d, generator=generator(9))
    monkeypatch.setattr("mechdiff.functional.permutation._CHUNK", 63)
    assert sign_flip(d, generator=generator(9)).p_max.tolist() == whole.p_max.tolist()


def test_shuffled_labels_agree_with_scipy():
    table, labels = differences(14, 3), torch.arange(14) < 6
    table[labels] += torch.tensor([0.0, 0.8, 2.0])
    found = label_shuffle(table, labels, generator=generator(9))
    parts = table[labels].numpy(), table[~labels].numpy()

    def size(a, b, axis):
        return np.abs(a.mean(axis) - b.mean(axis))

    theirs = reference.permutation_test(parts, size, n_resamples=np.inf, alternative="greater")
    assert found.p.tolist() == pytest.approx(theirs.pvalue.tolist(), abs=0.015)
    assert found.p[2] < 0.02
    order = torch.randperm(14, generator=generator(10))
    assert torch.equal(label_shuffle(table[order], labels[order], generator=generator(9)).p, found.p)


def test_the_largest_of_many_shuffled_differences_keeps_its_rate():
    labels = torch.arange(20) < 10
    fired = 0
    for trial in range(200):
        found = label_shuffle(differences(20, 30, trial), labels, generator=generator(11, trial), draws=199)
        assert (found.p_max >= found.p).all()
        fired += found.p_max.min() <= 0.05
    assert fired <= 200 * 0.05 + 2.6 * np.sqrt(200 * 0.05 * 0.95)
    with pytest.raises(FitError, match="0 of 20 prompts are of the first group"):
        label_shuffle(differences(20, 3), labels & False, generator=generator(11))
