import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from mechdiff.errors import FitError
from mechdiff.functional.intervals import bootstrap_means, centred, detectable, prompts_needed
from mechdiff.functional.percentiles import student, student_below
from mechdiff.functional.stats import bootstrap_mean, bootstrap_ratio, generator


def table(rows, columns, name="table"):
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator(0, name, rows, columns))


def ratio(means):
    return (means[:, 0] / means[:, 1])[:, None]


@pytest.mark.parametrize("n", [8, 20, 49])
def test_bca_of_skewed_means_agrees_with_scipy(n):
    x = table(n, 3).exp()  # skewed, so that BCa differs from percentiles
    ours = bootstrap_means(x, generator=generator(1), draws=20_000, expand=False)
    plain = bootstrap_means(x, generator=generator(1), draws=20_000, expand=False, method="percentile")
    for column in range(3):
        theirs = reference.bootstrap(
            (x[:, column].numpy(),),
            np.mean,
            n_resamples=20_000,
            method="BCa",
            rng=np.random.default_rng(2),
        ).confidence_interval
        scale = x[:, column].std().item() / math.sqrt(n)
        assert ours.low[column].item() == pytest.approx(theirs.low, abs=0.08 * scale)
        assert ours.high[column].item() == pytest.approx(theirs.high, abs=0.12 * scale)
        assert ours.high[column] > plain.high[column] + 0.1 * scale


def test_bca_of_a_ratio_agrees_with_scipy():
    x = table(20, 2).exp() + 0.3
    ours = bootstrap_means(x, ratio, generator=generator(3), draws=20_000, expand=False).at(0)
    theirs = reference.bootstrap(
        (x[:, 0].numpy(), x[:, 1].numpy()),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        n_resamples=20_000,
        method="BCa",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=0.02)


def test_with_many_prompts_a_column_has_the_interval_of_its_mean():
    x = table(60, 4)
    whole = bootstrap_means(x, generator=generator(5), draws=4000, expand=False)
    one = bootstrap_mean(x[:, 2], generator=generator(6), draws=4000)
    assert whole.at(2) == pytest.approx(one, abs=0.05)
    assert whole.n == 60
    both = bootstrap_means(x.exp(), ratio, generator=generator(5), draws=4000).at(0)
    assert both == pytest.approx(
        bootstrap_ratio(*x[:, :2].exp().T, generator=generator(7), draws=4000), abs=0.05
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), method=st.sampled_from(["bca", "percentile", "centred"]))
def test_order_of_prompts_changes_nothing_and_that_of_columns_only_their_order(seed, method):
    x = table(11, 6, seed)
    rows, columns = (torch.randperm(n, generator=generator(seed, n)) for n in (11, 6))

    def ends(values):
        return torch.stack(bootstrap_means(values, generator=generator(8), draws=80, method=method)[:3])

    assert torch.equal(ends(x[rows]), ends(x))
    assert torch.allclose(ends(x[:, columns]), ends(x)[:, columns], rtol=1e-12, atol=1e-14)


def test_a_constant_has_no_width_and_an_undefined_resample_bounds_nothing():
    same = bootstrap_means(torch.full((9, 2), 0.25), generator=generator(9))
    assert torch.stack(same[:3]).unique().tolist() == [0.25]

    def undefined(means):
        return torch.where(means > 0, 1 / means, torch.nan)

    x = torch.tensor([[1.0], [-0.9], [0.2]])
    wide = bootstrap_means(x, undefined, generator=generator(9), method="percentile").at(0)
    assert (wide.low, wide.high) == (-math.inf, math.inf)
    x = torch.cat([torch.ones(1), torch.zeros(9)])[:, None]  # without the first prompt nothing is defined
    assert bootstrap_means(x, undefined, generator=generator(9), method="bca").at(0).low == -math.inf


def test_centred_keeps_to_what_is_possible():
    drawn = torch.linspace(0.2, 0.6, 101, dtype=torch.float64)[:, None]
    found = centred(torch.tensor([0.1], dtype=torch.float64), drawn, 30, bounds=(0.0, 1.0)).at(0)
    assert (found.low, found.value) == (0.0, 0.1)
    assert found.high == pytest.approx(0.1 + 0.196, abs=0.001)


@pytest.mark.parametrize("n", [2, 3, 10, 17, 64, 301])
def test_students_quantile_is_that_of_scipy(n):
    for level in (0.9, 0.95):
        assert student(level, n) == pytest.approx(reference.t.ppf((1 + level) / 2, n - 1), rel=1e-12)


@pytest.mark.parametrize("t", [-2.5, -0.1, 0.0, 1.0, 40.0])
def test_students_distribution_is_that_of_scipy(t):
    for n in (2, 3, 12, 41):
        assert student_below(t, n) == pytest.approx(reference.t.cdf(t, n - 1), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("n", [8, 16, 60])
def test_intervals_of_few_prompts_hold_the_truth_as_often_as_they_say(n):
    x = table(n, 3000)  # as many trials as columns
    for method, least in (("bca", 0.93), ("percentile", 0.94), ("centred", 0.94)):
        found = bootstrap_means(x, generator=generator(10), method=method)
        held = ((found.low <= 0) & (found.high >= 0)).double().mean().item()
        assert least <= held <= 0.965, method
    narrow = bootstrap_means(x, generator=generator(10), expand=False)
    assert (narrow.high - narrow.low).mean() < (found.high - found.low).mean()


@pytest.mark.parametrize("n", [16, 64, 300])
def test_what_is_detectable_is_found_with_its_power(n):
    effect = detectable(2.0, n, power=0.8) / (2.0 / math.sqrt(n))
    z = reference.norm.ppf(0.975)
    assert reference.norm.sf(z - effect) + reference.norm.cdf(-z - effect) == pytest.approx(0.8, abs=1e-4)


def test_prompts_needed_detect_what_they_are_needed_for():
    n = prompts_needed(2.0, 0.3)
    assert detectable(2.0, n) <= 0.3 < detectable(2.0, n - 1)


def test_one_prompt_is_too_few():
    with pytest.raises(FitError, match="1 prompts are too few; at least 2"):
        bootstrap_means(torch.ones(1, 3), generator=generator(9))
