"""Probes: the two forms agree, thresholds keep what they promise, and intervals stay honest at the ends."""

import pytest
import torch

from mechdiff.errors import FitError
from mechdiff.functional.handles import auroc
from mechdiff.functional.probes import auroc_interval, fit_probe, keeping
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.steering import whitened_directions


def states(n: int, d: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draws, dtype=torch.float64) * torch.linspace(0.3, 2, d).double()


@pytest.mark.parametrize(("n", "d"), [(40, 6), (5, 30), (8, 17)])
def test_both_forms_give_the_whitened_direction(n, d):
    a, b = states(n, d) + 1, states(n, d, 1)
    assert (fit_probe(a, b, 0.2).direction - whitened_directions(a, b, 0.2)).abs().max() < 1e-10


def test_a_score_is_zero_halfway_and_grows_towards_the_positives():
    a, b = states(20, 5) + 1, states(20, 5, 1)
    probe = fit_probe(a, b)
    middle = (a.mean(0) + b.mean(0)) / 2
    assert probe(middle).abs() < 1e-12
    assert probe(a.mean(0)) > 0 > probe(b.mean(0))


def test_an_area_is_that_of_all_pairs_and_its_interval_holds_it():
    labels = torch.arange(30) % 3 == 0
    scores = states(30, 1)[:, 0].round(decimals=1) + 0.5 * labels  # with ties
    found = auroc_interval(scores, labels, generator=torch.Generator().manual_seed(0))
    assert found.value == pytest.approx(auroc(scores, labels))
    assert found.low < found.value < found.high
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    again = auroc_interval(scores[order], labels[order], generator=torch.Generator().manual_seed(0))
    assert again == found


def test_classes_that_are_wholly_apart_get_the_exact_bound():
    labels = torch.arange(20) < 8
    found = auroc_interval(labels.double(), labels, generator=torch.Generator().manual_seed(0))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == binomial_interval(8, 8).low
    below = auroc_interval(-labels.double(), labels, generator=torch.Generator().manual_seed(0))
    assert (below.value, below.low, below.high) == (0.0, 0.0, binomial_interval(0, 8).high)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_threshold_keeps_its_share_and_a_larger_one_does_not(n, share):
    scores = states(n, 1)[:, 0]
    threshold = keeping(scores, share)
    assert (scores >= threshold).double().mean() >= share - 1e-12
    assert (scores > threshold).double().mean() < share


def test_mistakes_are_named():
    with pytest.raises(FitError, match="shrinkage is 0"):
        fit_probe(states(3, 2), states(3, 2), 0.0)
    with pytest.raises(FitError, match="found 0 and 3 rows"):
        fit_probe(states(3, 2)[:0], states(3, 2))
    with pytest.raises(FitError, match="scatter"):
        fit_probe(torch.ones(3, 2), torch.zeros(3, 2))
    with pytest.raises(FitError, match="1 positives, 0 negatives"):
        auroc_interval(torch.ones(1), torch.ones(1), generator=torch.Generator())
    with pytest.raises(FitError, match="keeps 0 of 3"):
        keeping(torch.ones(3), 0)
