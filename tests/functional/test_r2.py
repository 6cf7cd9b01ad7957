import pytest
import torch

from mechdiff.config import LAMBDA_GRID
from mechdiff.errors import FitError
from mechdiff.functional.clt import (
    fit_ridge,
    identity_map,
    map_states,
    procrustes,
    ridge_path,
    ridge_path_rows,
)
from mechdiff.functional.moments import Moments
from mechdiff.functional.r2 import map_r2, map_sse, path_sse, r2, r2_delta, sse_rows
from mechdiff.functional.stats import bootstrap_ratio, generator


def gaussian(*shape, name="x"):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, name, *shape))


def draw(n, name):
    x = gaussian(n, 8, name=name) @ gaussian(8, 8, name="mix") + 3
    return x, x + 0.2 * x @ gaussian(8, 8, name="change") + gaussian(n, 8, name=name + "noise") + 1


FIT, TEST = draw(60, "fit"), draw(40, "test")


@pytest.mark.parametrize("shrink", ["identity", "zero"])
@pytest.mark.parametrize("rows", [60, 5])
def test_path_errors_need_no_second_pass(shrink, rows):
    x, y = FIT[0][:rows], FIT[1][:rows]
    for path in (
        ridge_path(Moments.of(x, y), LAMBDA_GRID, shrink=shrink),
        ridge_path_rows(x, y, LAMBDA_GRID, shrink=shrink),
    ):
        errors = path_sse(path, Moments.of(*TEST))
        direct = torch.stack(
            [sse_rows(map_states(TEST[0], path.map(i)), TEST[1]).sum() for i in range(len(LAMBDA_GRID))]
        )
        assert ((errors - direct).abs() / direct).max() < 1e-10


@pytest.mark.parametrize("affine", [fit_ridge(*FIT, 0.1), procrustes(Moments.of(*FIT)), identity_map(8)])
def test_scores_from_moments_are_scores_from_rows(affine):
    (x, y), moments = TEST, Moments.of(*TEST)
    pred = map_states(x, affine)
    assert torch.allclose(map_sse(affine, moments), (y - pred).square().sum(0), rtol=1e-11)
    assert map_r2(affine, moments).item() == pytest.approx(r2(pred, y).item(), abs=1e-12)
    assert torch.allclose(map_r2(affine, moments, per_dim=True), r2(pred, y, per_dim=True), atol=1e-11)
    ours = map_r2(affine, moments, baseline="identity").item()
    assert ours == pytest.approx(r2_delta(pred, x, y).item(), abs=1e-11)


def test_r2_is_one_minus_a_ratio_that_can_be_bootstrapped():
    x, y = TEST
    pred = map_states(x, fit_ridge(*FIT, 0.1))
    pooled = bootstrap_ratio(
        sse_rows(pred, y), sse_rows(y.mean(0), y), complement=True, generator=generator(1)
    )
    assert pooled.value == pytest.approx(r2(pred, y).item(), abs=1e-13)
    delta = bootstrap_ratio(sse_rows(pred, y), sse_rows(x, y), complement=True, generator=generator(1))
    assert delta.value == pytest.approx(r2_delta(pred, x, y).item(), abs=1e-13)
    assert delta.low < delta.value < delta.high


def test_per_dimension_values_pool_by_variance():
    x, y = TEST
    shares = (y - y.mean(0)).square().sum(0)
    assert ((r2(x, y, per_dim=True) * shares).sum() / shares.sum()).item() == pytest.approx(
        r2(x, y).item(), abs=1e-13
    )
    constant = torch.cat([y, torch.ones(40, 2, dtype=torch.float64)], 1)
    pred = torch.cat([y, torch.ones(40, 1), torch.zeros(40, 1)], 1)
    assert r2(pred, constant, per_dim=True)[-2:].tolist() == [1.0, 0.0]


def test_fixed_points():
    x, y = TEST
    assert r2_delta(x, x, y) == 0
    assert r2_delta(y, x, y) == r2(y, y) == 1
    assert abs(r2(y.mean(0).expand_as(y), y)) < 1e-15
    with pytest.raises(FitError, match="source and target are equal"):
        r2_delta(x, x, x)
    with pytest.raises(FitError, match="source and target are equal"):
        map_r2(identity_map(8), Moments.of(x, x), baseline="identity")
    with pytest.raises(FitError, match="does not vary"):
        r2(torch.zeros(3, 2), torch.ones(3, 2))


def test_shrinking_to_the_identity_wins_where_rows_are_few():
    x, y = draw(12, "few")
    y = x + 0.1 * (y - x)
    near = TEST[0] + 0.1 * (TEST[1] - TEST[0])

    def best(shrink):
        path = ridge_path(Moments.of(x, y), LAMBDA_GRID, shrink=shrink)
        return path_sse(path, Moments.of(TEST[0], near)).min()

    assert best("identity") < 0.7 * best("zero")
