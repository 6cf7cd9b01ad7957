"""The arithmetic of attribution: contractions, quadrature, completeness."""

import math

import pytest
import torch

from mechdiff.functional.attribution import (
    completeness_error,
    gauss_legendre,
    head_contributions,
    head_products,
)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_a_product_is_that_with_the_contribution() -> None:
    gradient, z, weight = draw(2, 3, 7), draw(2, 3, 4, 5), draw(4, 5, 7)
    wanted = (head_contributions(z, weight) * gradient[:, :, None]).sum(-1)
    assert (head_products(gradient, z, weight) - wanted).abs().max() < 1e-12
    one = head_products(gradient, z[:1, :1], weight)
    assert (one - head_products(gradient, z[:1, :1].expand(2, 3, -1, -1), weight)).abs().max() < 1e-12


def test_half_precision_is_multiplied_in_float32() -> None:
    gradient, z, weight = (x.bfloat16() for x in (draw(2, 3, 7), draw(2, 3, 4, 5), draw(4, 5, 7)))
    found = head_products(gradient, z, weight)
    assert found.dtype == torch.float32
    exact = head_products(gradient.double(), z.double(), weight.double())
    assert (found - exact).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 5, 16, 50])
def test_quadrature_is_exact_for_polynomials(steps: int) -> None:
    nodes, weights = gauss_legendre(steps)
    assert nodes.shape == weights.shape == (steps,)
    assert bool(((nodes > 0) & (nodes < 1)).all())
    for degree in (0, 1, steps, 2 * steps - 1):
        assert (weights * nodes**degree).sum().item() == pytest.approx(1 / (degree + 1), abs=1e-13)


def test_quadrature_converges_faster_than_the_midpoint_rule() -> None:
    nodes, weights = gauss_legendre(6)
    middle = (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    errors = [
        abs((w * x.exp()).sum().item() - (math.e - 1))
        for x, w in ((nodes, weights), (middle, torch.tensor(1 / 6)))
    ]
    assert errors[0] < 1e-14
    assert errors[1] > 1e-4


def test_the_share_that_is_missed() -> None:
    total, end, start = torch.tensor([2.0, 0.0, 1.0, -1.9]), torch.tensor([3.0, 1.0, 1.0, 1.0]), torch.ones(4)
    start[3] = 3.0
    assert completeness_error(total, end, start).tolist() == pytest.approx([0.0, 0.0, math.inf, 0.05])
