import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from mechdiff.errors import FitError
from mechdiff.functional.correlation import bootstrap_correlation
from mechdiff.functional.intervals import bootstrap_means
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_sums,
    generator,
    group_index,
    jackknife,
    measurable,
)


def rows(n, name="rows"):
    return torch.randn(n, dtype=torch.float64, generator=generator(0, name, n))


def test_generator_is_the_same_in_another_process():
    code = "from mechdiff.functional.stats import generator as g; print(g(17, 'r2', 3).initial_seed())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == generator(17, "r2", 3).initial_seed()
    assert generator(1, "ab", "c").initial_seed() != generator(1, "a", "bc").initial_seed()


def test_bootstrap_mean_agrees_with_scipy():
    x = rows(60)
    ours = bootstrap_mean(x, generator=generator(1), draws=4000)
    theirs = reference.bootstrap(
        (x.numpy(),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.value == pytest.approx(x.mean().item(), abs=1e-15)
    assert ours.n == 60
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


@pytest.mark.parametrize("n", [12, 60])
def test_bootstrap_covers_the_truth(n):
    """Plain percentiles hold the truth in 90 % of trials with 12 prompts."""
    hits = 0
    for trial in range(400):
        x = torch.rand(n, dtype=torch.float64, generator=generator(2, trial))
        low, high = bootstrap_mean(x, generator=generator(3, trial), draws=300)[1:3]
        hits += low <= 0.5 <= high
    assert 0.925 <= hits / 400 <= 0.98


def test_few_prompts_get_the_intervals_of_a_table():
    """One mechanism serves single numbers and tables."""
    x = rows(24).exp()
    one, plain = (bootstrap_mean(x, generator=generator(11), draws=4000) for _ in range(2))
    many = bootstrap_means(x[:, None], generator=generator(11), draws=4000).at(0)
    assert one == plain == pytest.approx(many, rel=1e-12)
    uncorrected = bootstrap_means(x[:, None], generator=generator(11), draws=4000, method="percentile").at(0)
    assert one.high > uncorrected.high  # the mean of what is skewed to the right may lie far right


def test_a_ratio_that_rests_on_few_prompts_has_the_interval_of_few():
    """Corrected percentiles that count all prompts hold the truth in 91 % of such trials."""
    truth, held, narrow = 0.5, 0, 0
    for trial in range(300):
        gap = (1.2 * rows(12, ("gap", trial))).exp()
        left = gap * torch.rand(12, dtype=torch.float64, generator=generator(13, trial))
        found = bootstrap_ratio(left, gap, generator=generator(14, trial), draws=300)
        held += found.low <= truth <= found.high
        plain = bootstrap_sums(
            torch.stack([left, gap], 1),
            lambda s: s[:, 0] / s[:, 1],
            generator=generator(14, trial),
            draws=300,
        )
        narrow += plain.low <= truth <= plain.high
    assert narrow < held
    assert 0.92 <= held / 300 <= 0.985
    same = bootstrap_ratio(left, torch.ones(12), generator=generator(15))
    assert same == pytest.approx(bootstrap_mean(left, generator=generator(15)))  # all count: it is a mean


def test_ratio_resamples_both_together():
    denominator = rows(30).exp()
    low_noise = bootstrap_ratio(3 * denominator, denominator, generator=generator(4))
    assert max(abs(end - 3) for end in low_noise[:3]) < 1e-12
    recovered = bootstrap_ratio(0.25 * denominator, denominator, generator=generator(4), complement=True)
    assert max(abs(end - 0.75) for end in recovered[:3]) < 1e-12


def test_groups_are_resampled_whole():
    prompts = rows(25)
    copies = prompts.repeat_interleave(8)
    groups = [f"p{i}" for i in range(25) for _ in range(8)]
    grouped = bootstrap_mean(copies, groups=groups, generator=generator(5))
    single = bootstrap_mean(prompts, generator=generator(5))
    assert grouped.n == 25
    assert grouped[:3] == pytest.approx(single[:3], abs=1e-14)
    naive = bootstrap_mean(copies, generator=generator(5))
    assert naive.high - naive.low < 0.6 * (grouped.high - grouped.low)  # eight copies are not eight prompts


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_order_of_prompts_changes_nothing(seed):
    x, y = rows(12, ("x", seed)), rows(12, ("y", seed))
    groups = torch.randint(5, (12,), generator=generator(seed, "groups"))
    shuffle = torch.randperm(12, generator=generator(seed, "order"))

    def answers(x, y, groups):
        return (
            bootstrap_ratio(x, y.exp(), groups=groups, generator=generator(1), draws=50),
            bootstrap_mean(x, generator=generator(1), draws=50),
            bootstrap_correlation(x, y, groups % 2, generator=generator(1), draws=50),
            jackknife(x, 0.0),
        )

    assert answers(x, y, groups) == answers(x[shuffle], y[shuffle], groups[shuffle])


def test_chunks_do_not_change_the_draws(monkeypatch):
    x = rows(50)
    whole = bootstrap_mean(x, generator=generator(6))
    monkeypatch.setattr("mechdiff.functional.stats._CHUNK", 777)
    assert bootstrap_mean(x, generator=generator(6)) == pytest.approx(whole, abs=1e-14)


def test_correlation_is_within_class():
    a, b = rows(40, "a"), rows(40, "b")
    x, y = torch.cat([a, a + 100]), torch.cat([b, b - 100])
    classes = ["target"] * 40 + ["neutral"] * 40
    within = bootstrap_correlation(x, y, classes, generator=generator(7))
    centred = [torch.cat([v - v.mean()] * 2).numpy() for v in (a, b)]
    assert within.value == pytest.approx(reference.pearsonr(*centred).statistic, abs=1e-12)
    assert within.low < within.value < within.high
    assert bootstrap_correlation(x, y, generator=generator(7)).value < -0.99
    plain = bootstrap_correlation(a, b, generator=generator(7), draws=3000)
    theirs = reference.pearsonr(a.numpy(), b.numpy()).confidence_interval()
    assert plain[1:3] == pytest.approx(theirs, abs=0.1)


def test_undefined_answers_are_refused():
    with pytest.raises(FitError, match="constant within every class"):
        bootstrap_correlation(torch.ones(6) * 0.1, rows(6), generator=generator(8))
    with pytest.raises(FitError, match="denominator"):
        bootstrap_ratio(rows(4), torch.zeros(4), generator=generator(8))
    with pytest.raises(FitError, match="0 rows"):
        bootstrap_mean(torch.zeros(0), generator=generator(8))
    with pytest.raises(FitError, match="successes=5"):
        binomial_interval(5, 4)


def test_a_denominator_that_may_be_zero_bounds_nothing():
    gap = torch.tensor([1.0, -0.9, 0.2])
    interval = bootstrap_ratio(torch.ones(3), gap, generator=generator(9))
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert not measurable(bootstrap_mean(gap, generator=generator(9)))
    assert measurable(Interval(1.0, 0.5, 1.5, 9), 0.3)
    assert not measurable(Interval(1.0, 0.5, 1.5, 9), 0.4)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = rows(30)
    interval = jackknife((x.sum() - x) / 29, x.mean().item())
    half = reference.t.ppf(0.975, 29) * x.std() / math.sqrt(30)
    assert interval.high - interval.value == pytest.approx(half.item(), rel=1e-12)
    assert jackknife(torch.ones(1), 1.0)[1:3] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 40), (3, 40), (20, 40), (39, 40), (40, 40), (7, 1700)]
)
def test_binomial_interval_is_exact(k, n):
    ours, theirs = binomial_interval(k, n), reference.binomtest(k, n).proportion_ci(method="exact")
    assert ours[1:3] == pytest.approx((theirs.low, theirs.high), abs=1e-10)
    one = reference.binomtest(k, n, alternative="less").proportion_ci(method="exact")
    assert binomial_interval(k, n, side="upper")[1:3] == pytest.approx((one.low, one.high), abs=1e-10)


def test_group_index_takes_tensors_and_labels():
    assert (
        group_index(torch.tensor([7, 7, 3]), 3).tolist()
        == group_index(["x", "x", "a"], 3).tolist()
        == [0, 0, 1]
    )
    with pytest.raises(AssertionError, match="2 group labels"):
        group_index(["a", "b"], 3)


def test_bootstrap_of_sums_is_that_of_a_ratio_and_knows_prompts():
    top, bottom = rows(40).square(), rows(40, "more").square() + 1
    prompts = torch.arange(40) // 2
    cells = torch.stack([top, bottom], 1)
    ours = bootstrap_sums(
        cells, lambda s: s[:, 0] / s[:, 1], generator=generator(3), draws=8000, groups=prompts
    )
    theirs = bootstrap_ratio(top, bottom, generator=generator(4), draws=8000, groups=prompts)
    assert ours.value == pytest.approx(theirs.value, rel=1e-12)
    assert ours.n == theirs.n == 20
    assert ours.low == pytest.approx(theirs.low, rel=0.05)
    assert ours.high == pytest.approx(theirs.high, rel=0.05)
    order = torch.randperm(40, generator=generator(5))
    again = bootstrap_sums(
        cells[order], lambda s: s[:, 0] / s[:, 1], generator=generator(3), draws=8000, groups=prompts[order]
    )
    assert again == pytest.approx(ours, rel=1e-12)
