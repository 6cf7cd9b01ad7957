import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from mechdiff.config import LAMBDA_GRID
from mechdiff.errors import FitError
from mechdiff.functional.clt import (
    AffineMap,
    fit_ridge,
    identity_map,
    map_states,
    mean_shift_map,
    procrustes,
    reduced_rank,
    ridge_path,
    ridge_path_rows,
)
from mechdiff.functional.moments import Moments
from mechdiff.functional.stats import generator


def gaussian(*shape, name="x"):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, name, *shape))


def distance(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


@pytest.fixture
def rows():
    """Correlated sources with a mean, and a target that is near to them."""
    x = gaussian(50, 8) @ gaussian(8, 8, name="mix") + 3
    return x, x + 0.3 * x @ gaussian(8, 8, name="change") / 3 + 0.1 * gaussian(50, 8, name="noise") + 1


@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_no_shrinkage_recovers_a_planted_map(shrink):
    x, planted = gaussian(40, 6) + 5, AffineMap(gaussian(6, 6, name="w"), gaussian(6, name="b"))
    y = map_states(x, planted)
    assert distance(fit_ridge(x, y, 0.0, shrink=shrink), planted) < 1e-12
    assert distance(fit_ridge(x, y, 1e-14, shrink=shrink), planted) < 1e-12


def test_full_shrinkage_predicts_the_mean_or_the_mean_shift(rows):
    x, y = rows
    mean = map_states(x, fit_ridge(x, y, 1e12, shrink="zero"))
    assert (mean - y.mean(0)).abs().max() < 1e-9
    shift = map_states(x, fit_ridge(x, y, 1e12, shrink="identity"))
    assert (shift - (x + y.mean(0) - x.mean(0))).abs().max() < 1e-9
    assert (shift - map_states(x, mean_shift_map(Moments.of(x, y)))).abs().max() < 1e-9


@pytest.mark.parametrize("lambda_", LAMBDA_GRID)
def test_ridge_is_augmented_least_squares(rows, lambda_):
    x, y = rows
    a, b = x - x.mean(0), y - y.mean(0)
    scale = a.square().sum() / 8
    padded = torch.cat([a, (lambda_ * scale).sqrt() * torch.eye(8, dtype=torch.float64)])
    weight = torch.linalg.lstsq(padded, torch.cat([b, torch.zeros(8, 8, dtype=torch.float64)])).solution
    ours = fit_ridge(x, y, lambda_)
    assert (ours.weight - weight).abs().max() < 1e-11
    assert (ours.bias - (y.mean(0) - x.mean(0) @ weight)).abs().max() < 1e-11


@pytest.mark.parametrize("n", [5, 12, 13, 40])
@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_dual_form_is_primal_form(n, shrink):
    x, y = gaussian(n, 12) + 1, gaussian(n, 12, name="y")
    primal, dual = (
        ridge_path(Moments.of(x, y), LAMBDA_GRID, shrink=shrink),
        ridge_path_rows(x, y, LAMBDA_GRID, shrink=shrink),
    )
    picked = [fit_ridge(x, y, lambda_, shrink=shrink) for lambda_ in LAMBDA_GRID]
    for index in range(len(LAMBDA_GRID)):
        size = 1 + primal.map(index).weight.abs().max()
        assert distance(primal.map(index), dual.map(index)) < 1e-12 * size
        assert distance(primal.map(index), picked[index]) < 1e-12 * size


def test_fewer_rows_than_dimensions_interpolate_with_the_smallest_weight():
    x, y = gaussian(6, 20), gaussian(6, 4, name="y")
    smallest = torch.linalg.pinv(x - x.mean(0)) @ (y - y.mean(0))
    for affine in (fit_ridge(x, y, 0.0), ridge_path(Moments.of(x, y), [0.0], shrink="zero").map(0)):
        assert (affine.weight - smallest).abs().max() < 1e-10
        assert (map_states(x, affine) - y).abs().max() < 1e-10


def test_lambda_depends_on_neither_rows_nor_scale(rows):
    x, y = rows
    once = fit_ridge(x, y, 0.1)
    assert distance(fit_ridge(x.repeat(3, 1), y.repeat(3, 1), 0.1), once) < 1e-12
    assert distance(fit_ridge(1000 * x, 1000 * y, 0.1), (once.weight, 1000 * once.bias)) < 1e-9


@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_reduced_rank_is_the_best_of_its_rank(rows, shrink):
    x, y = rows
    moments, lambda_ = Moments.of(x, y), 0.05
    a, b = x - x.mean(0), (y - x if shrink == "identity" else y)
    b = b - b.mean(0)
    penalty = lambda_ * a.square().sum() / 8
    start = (
        torch.eye(8, dtype=torch.float64) if shrink == "identity" else torch.zeros(8, 8, dtype=torch.float64)
    )

    def loss(added):
        return (b - a @ added).square().sum() + penalty * added.square().sum()

    full = fit_ridge(x, y, lambda_, shrink=shrink)
    assert distance(reduced_rank(moments, 8, lambda_, shrink=shrink), full) < 1e-11
    # By augmenting the rows, ridge is plain regression: the best fitted values of rank k are a truncated SVD.
    design = torch.cat([a, penalty.sqrt() * torch.eye(8, dtype=torch.float64)])
    fitted = design @ (full.weight - start)
    beyond = (loss(full.weight - start), torch.linalg.svdvals(fitted))
    for rank in (1, 3):
        added = reduced_rank(moments, rank, lambda_, shrink=shrink).weight - start
        assert torch.linalg.matrix_rank(added, atol=1e-9) == rank
        assert loss(added).item() == pytest.approx(
            (beyond[0] + beyond[1][rank:].square().sum()).item(), rel=1e-11
        )


def test_procrustes_agrees_with_scipy_and_recovers_a_rotation(rows):
    x, y = rows
    a, b = (v - v.mean(0) for v in (x, y))
    turn, total = orthogonal_procrustes(a.numpy(), b.numpy())
    rigid, scaled = (procrustes(Moments.of(x, y), scaled=s) for s in (False, True))
    assert (rigid.weight - torch.from_numpy(turn)).abs().max() < 1e-11
    assert (scaled.weight - total / a.square().sum() * torch.from_numpy(turn)).abs().max() < 1e-11
    rotation = torch.linalg.qr(gaussian(8, 8, name="rotation")).Q
    found = procrustes(Moments.of(x, 2.5 * x @ rotation - 4))
    assert distance(found, (2.5 * rotation, torch.full((8,), -4.0, dtype=torch.float64))) < 1e-11


def test_map_states_keeps_the_dtype_and_computes_in_float32():
    x = gaussian(2, 3, 64, name="wide").bfloat16()
    shift = AffineMap(torch.eye(64), torch.full((64,), 1e-3))
    mapped = map_states(x, shift)
    assert mapped.dtype == torch.bfloat16
    assert torch.equal(mapped, (x.float() + 1e-3).bfloat16())
    assert torch.equal(map_states(x, identity_map(64)), x)


def test_out_of_range_is_one_line(rows):
    moments = Moments.of(*rows)
    wrong = {
        "lambda_=-1": lambda: ridge_path(moments, [1.0, -1.0]),
        "lambda_=nan": lambda: fit_ridge(*rows, float("nan")),
        r"rank=9 must be in 1\.\.8": lambda: reduced_rank(moments, 9, 0.1),
        "rank=0": lambda: reduced_rank(moments, 0, 0.1),
        "over 1 rows": lambda: fit_ridge(rows[0][:1], rows[1][:1]),
        "width 8 and target width 3": lambda: fit_ridge(rows[0], rows[1][:, :3], shrink="identity"),
        "source width 8": lambda: procrustes(moments.columns(0, 5)),
        "does not vary": lambda: procrustes(Moments.of(torch.ones(4, 2), torch.eye(4)[:, :2])),
    }
    for message, call in wrong.items():
        with pytest.raises(FitError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_source_that_does_not_vary_predicts_the_mean():
    x, y = torch.ones(5, 3), gaussian(5, 2)
    for affine in (fit_ridge(x, y, 0.1), fit_ridge(x[:2], y[:2], 0.0)):
        assert affine.weight.abs().max() == 0
        assert affine.bias.isfinite().all()
