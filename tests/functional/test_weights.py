"""Weight changes against a singular value decomposition."""

import pytest
import torch

from mechdiff.functional.weights import (
    change_shares,
    effective_rank,
    singular_values,
    stable_rank,
    weight_change,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 7), (7, 1)])
def test_singular_values_are_those_of_the_svd(shape):
    matrix = draw(*shape)
    reference = torch.linalg.svdvals(matrix)
    assert (singular_values(matrix) - reference).abs().max() < 1e-11 * reference.max()


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_planted_rank_is_found(rank):
    """Orthogonal factors of equal size: both ranks are the planted one; in float32, nearly."""
    left, right = (torch.linalg.qr(draw(n, rank, seed=n)).Q for n in (24, 40))
    base, delta = draw(24, 40), left @ right.T
    change = weight_change(base, base + delta)
    assert change.stable_rank == pytest.approx(rank, rel=1e-10)
    assert change.effective_rank == pytest.approx(rank, rel=1e-10)
    assert change.norm == pytest.approx(rank**0.5, rel=1e-12)
    assert change.relative == pytest.approx(rank**0.5 / base.norm().item(), rel=1e-12)
    rounded = weight_change(base.float(), (base + delta).float())
    assert rounded.stable_rank == pytest.approx(rank, rel=1e-5)
    assert rounded.effective_rank == pytest.approx(rank, rel=1e-3)


def test_ranks_lie_between_one_and_the_smaller_side_and_ignore_scale_and_rotation():
    matrix = draw(12, 30)
    values = singular_values(matrix)
    rotated = singular_values(torch.linalg.qr(draw(12, 12, seed=1)).Q @ matrix * 7)
    for rank in (stable_rank, effective_rank):
        assert 1 <= rank(values) <= 12
        assert rank(values) == pytest.approx(rank(rotated), rel=1e-12)
    assert stable_rank(values) <= effective_rank(values)


def test_no_change_is_zero_and_vectors_have_no_rank():
    weight = draw(4, 6)
    assert weight_change(weight, weight.clone()) == (0.0, 0.0, 0.0, 0.0)
    assert weight_change(weight[0], weight[0] * 2) == (weight[0].norm().item(), 1.0, None, None)
    assert weight_change(weight, weight * 2, ranks=False).stable_rank is None
    assert weight_change(weight * 0, weight).relative == float("inf")
    assert weight_change(weight * 0, weight * 0).relative == 0.0


def test_a_change_below_single_precision_of_the_sum_is_seen():
    base = torch.full((64, 64), 1.0)
    tuned = base.clone()
    tuned[3, 5] += 2**-23
    assert weight_change(base, tuned).norm == 2**-23


def test_shares_sum_to_one_or_are_zero():
    assert change_shares(draw(50).abs()).sum().item() == pytest.approx(1, abs=1e-15)
    assert change_shares([0.0, 0.0]).tolist() == [0.0, 0.0]
