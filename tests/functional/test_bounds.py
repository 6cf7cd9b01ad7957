"""Tests that a number is within a bound."""

from __future__ import annotations

import pytest
import torch
from scipy import stats as reference

from mechdiff.errors import FitError
from mechdiff.functional.bounds import equivalent, mean_below, share_below
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import generator


def table(rows: int, columns: int, name: object = "table") -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator(0, name, rows, columns))


@pytest.mark.parametrize("n", [3, 12, 41])
def test_a_mean_below_a_bound_is_that_of_scipy(n: int) -> None:
    x = table(n, 4) + torch.tensor([-2.0, 0.0, 0.5, 3.0])
    theirs = reference.ttest_1samp(x.numpy(), 0.5, alternative="less").pvalue
    assert mean_below(x, 0.5).tolist() == pytest.approx(theirs.tolist(), rel=1e-8, abs=1e-12)
    above = reference.ttest_1samp(x.numpy(), -0.5, alternative="greater").pvalue
    assert equivalent(x, 0.5).tolist() == pytest.approx(list(map(max, theirs, above)), rel=1e-8, abs=1e-12)


def test_what_is_at_the_bound_passes_in_five_per_cent_of_trials() -> None:
    x = table(12, 4000) + 1.0
    assert float((mean_below(x, 1.0) <= 0.05).double().mean()) == pytest.approx(0.05, abs=0.01)
    assert float((equivalent(x, 1.0) <= 0.05).double().mean()) <= 0.06


def test_without_spread_a_mean_is_certain_but_at_the_bound() -> None:
    assert mean_below(torch.tensor([[0.0, 1.0, 2.0]] * 3), 1.0).tolist() == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 40), (7, 40), (40, 40), (3, 900)])
def test_a_share_below_a_bound_is_that_of_scipy_and_of_the_exact_interval(k: int, n: int) -> None:
    for bound in (0.02, 0.3):
        theirs = reference.binomtest(k, n, bound, alternative="less").pvalue
        assert share_below(k, n, bound) == pytest.approx(theirs, rel=1e-9)
    if k < n:
        assert share_below(k, n, binomial_interval(k, n, side="upper").high) == pytest.approx(0.05, rel=1e-6)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(FitError, match="successes=5 of n=4"):
        share_below(5, 4, 0.1)
    with pytest.raises(FitError, match="bound=0"):
        equivalent(torch.zeros(3, 1), 0.0)
