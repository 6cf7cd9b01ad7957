"""PWCCA: its definition by another route, its invariances, and what it cannot say."""

import pytest
import torch

from mechdiff.errors import FitError
from mechdiff.functional.pwcca import pwcca, pwcca_jackknife
from mechdiff.functional.stats import generator


def gaussian(rows, columns, name):
    return torch.randn(rows, columns, generator=generator(3, name), dtype=torch.float64)


@pytest.fixture
def sides():
    x = gaussian(60, 4, "x") @ gaussian(4, 4, "mix")
    return x, torch.cat([x[:, :2] + gaussian(60, 2, "noise"), gaussian(60, 3, "own")], 1)


def test_the_value_is_that_of_whitened_covariances(sides):
    x, y = (s - s.mean(0) for s in sides)
    white_x, white_y = (s @ torch.linalg.inv(torch.linalg.cholesky(s.T @ s)).T for s in (x, y))
    values, vectors = torch.linalg.eigh(white_x.T @ white_y @ white_y.T @ white_x)
    variates = white_x @ vectors
    weight = sum((variates * x[:, j : j + 1]).sum(0).abs() for j in range(x.shape[1]))
    expected = (weight * values.clamp(min=0).sqrt()).sum() / weight.sum()
    assert pwcca(*sides, keep=1.0).item() == pytest.approx(expected.item(), abs=1e-10)


def test_invertible_maps_of_one_side_change_nothing(sides):
    x, y = sides
    mixed = 3 * y @ gaussian(5, 5, "map") + 7
    assert pwcca(x, mixed, keep=1.0).item() == pytest.approx(pwcca(x, y, keep=1.0).item(), abs=1e-9)
    assert pwcca(x, x @ gaussian(4, 4, "own map"), keep=1.0).item() == pytest.approx(1, abs=1e-9)


def test_unrelated_sides_read_less_and_the_interval_is_the_loop_over_blocks(sides):
    x, y = sides
    blocks = [list(range(i, i + 6)) for i in range(0, 60, 6)]
    found = pwcca_jackknife(x, y, blocks, keep=1.0)
    values = []
    for block in blocks:
        rest = [i for i in range(60) if i not in block]
        values.append(pwcca(x[rest], y[rest], keep=1.0).item())
    mean = sum(values) / 10
    half = 2.262157 * (9 / 10 * sum((v - mean) ** 2 for v in values)) ** 0.5
    assert found.high - found.value == pytest.approx(half, rel=1e-6)
    assert pwcca(x, y[torch.randperm(60, generator=generator(5))], keep=1.0) < found.low


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(8, 2), gaussian(8, 2, "a"), "does not vary"),
        (gaussian(8, 4, "a"), gaussian(8, 4, "b"), "8 rows with 8 directions"),
    ],
)
def test_undefined_values_are_refused(x, y, message):
    with pytest.raises(FitError, match=message):
        pwcca(x, y, keep=1.0)
