import math

import pytest
import torch

from mechdiff.errors import CheckpointError, FitError
from mechdiff.functional.clt import fit_ridge, ridge_path
from mechdiff.functional.moments import Moments
from mechdiff.functional.stats import generator
from mechdiff.modules import CLTMap, CLTMapSGD
from mechdiff.modules.clt_fit import CellFit, Estimator, other_rows
from mechdiff.results import Results
from tests.modules.planted import affine, fitted, planted, states, trainer, widths

POSITIONS = ("last", "user", "template")


def value(records, quantity, **where):
    (found,) = Results(records).select(
        quantity=quantity, **{"control": "none", "site": "resid_post.0", "positions": "user", **where}
    )
    return found.value


def test_a_planted_affine_change_is_found(tmp_path):
    data = planted(tmp_path, affine)
    records = fitted(CLTMap(**widths(data)), data)
    keys = [r.key for r in records]
    assert len(set(keys)) == len(keys)
    for record in records:
        assert record.value is not None
        assert math.isfinite(record.value)
        assert record.low <= record.value <= record.high or record.quantity == "r2_median"
        prompts = len(data.split["test"])
        assert record.n == prompts
        assert record.rows == prompts * (6 if record.positions == "user" else 1)
    for positions, least in (("user", 0.999), ("last", 0.9), ("template", 0.9)):
        for site in data.sites:
            where = {"site": site, "positions": positions}
            found = value(records, "r2_delta", **where)
            assert found > least
            for control in ("mean_shift", "shuffled", "wrong_layer"):
                assert value(records, "r2_delta", control=control, **where) < found - 0.3
            assert value(records, "r2", **where) > 0.99
            assert value(records, "r2", control="identity", **where) < value(records, "r2", **where)
    assert value(records, "cka") > 0.999
    assert value(records, "cka_debiased") > 0.999
    assert value(records, "cka", control="identity") < value(records, "cka")
    assert value(records, "cosine") > 0.999
    assert not Results(records).select(quantity="r2_delta", control="identity")


def test_a_mean_shift_is_reached_by_the_control(tmp_path):
    data = planted(tmp_path, lambda x, _: x + torch.linspace(1, 2, 12))
    records = fitted(CLTMap(**widths(data)), data)
    for positions in POSITIONS:
        for control in ("none", "mean_shift"):
            found = value(records, "r2_delta", positions=positions, control=control)
            assert found == pytest.approx(1, abs=1e-6)


def test_shuffled_rows_find_the_mean_change_alone(tmp_path):
    data = planted(tmp_path, lambda x, _: x + 5 * x.sin() + 1)
    records = fitted(CLTMap(**widths(data)), data)
    shift, shuffled, mapped = (
        value(records, "r2_delta", control=c) for c in ("mean_shift", "shuffled", "none")
    )
    assert mapped > shift + 0.05
    assert abs(shuffled - shift) < 0.1 * (mapped - shift) + 0.1


def test_equal_states_have_no_difference(tmp_path):
    data = planted(tmp_path, lambda x, _: x.clone())
    records = fitted(CLTMap(**widths(data)), data)
    deltas = Results(records).select(quantity="r2_delta")
    assert {(r.value, r.reason) for r in deltas} == {(None, "gap_too_small")}
    assert value(records, "r2") == pytest.approx(1, abs=1e-10)
    assert {r.control for r in deltas} == {"none", "mean_shift", "shuffled", "wrong_layer"}


def test_a_difference_within_rounding_is_none(tmp_path):
    data = planted(tmp_path, lambda x, _: x * (1 + 1e-6))
    records = fitted(CLTMap(**widths(data)), data)
    assert {r.reason for r in Results(records).select(quantity="r2_delta")} == {"gap_too_small"}


def test_unequal_widths(tmp_path):
    data = planted(tmp_path, lambda x, i: affine(x, i, d=8))
    with pytest.raises(FitError, match=r"model\.shrink"):
        CLTMap(**widths(data))
    module = CLTMap(**widths(data), shrink="zero", matrix=True)
    records = fitted(module, data)
    assert value(records, "r2", matrix=None) > 0.99
    assert module.controls() == ["shuffled", "wrong_layer"]
    assert {r.control for r in records} == {"none", "shuffled", "wrong_layer"}
    assert not Results(records).select(quantity="r2_delta")
    assert value(records, "r2", control="shuffled") < 0.1


@pytest.mark.parametrize("shrink", ["identity", "zero"])
@pytest.mark.parametrize("d", [12, 64])  # 64: fewer rows than dimensions at `last`, more at `user`
def test_maps_are_those_of_the_rows(tmp_path, shrink, d):
    data = planted(tmp_path, affine, sites=1, d=d, batch_size=20)
    module = CLTMap(**widths(data), shrink=shrink)
    fitted(module, data)
    for group, positions in enumerate(POSITIONS):
        batch = data.read(data.rows("train", [positions]))
        x, y = batch["source"]["resid_post.0"], batch["target"]["resid_post.0"]
        assert (len(x) < d) == (d == 64 and positions != "user")
        lambda_ = module.estimator.lambdas[int(module.chosen[0, group])]
        expected = fit_ridge(x, y, lambda_, shrink=shrink)
        found = module.affine(0, group)
        torch.testing.assert_close(found.weight, expected.weight.float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.bias, expected.bias.float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(module.affine(0, group, "mean_shift").bias, (y - x).mean(0))


def test_the_control_has_the_lambda_of_the_map():
    x, estimator = states(), Estimator("ridge", "identity", (1e-3, 0.1, 10.0), None)
    y, fit = affine(x, noise=3.0), CellFit(12, 12, torch.device("cpu"))
    fit.add(x, y, "identity", generator(0))
    solution = fit.solve(Moments.of(x, y), estimator)
    x, y = x.double(), y.double()
    other = x + (y - x)[other_rows(len(x), generator(0))]
    path = ridge_path(Moments.of(x, other), estimator.lambdas)
    assert torch.allclose(path.map(solution.chosen).weight, solution.shuffled.weight, atol=1e-12)
    assert not torch.allclose(path.map(2).weight, solution.shuffled.weight, atol=1e-3)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_no_row_stays_where_it_is(count):
    for seed in range(10):
        other = other_rows(count, generator(seed))
        assert (other != torch.arange(count)).all()
        assert other.sort().values.tolist() == list(range(count))
    assert other_rows(1, generator(0)).tolist() == [0]


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"solver": "procrustes"}, -1.0),
        ({"solver": "procrustes", "shrink": "zero"}, -1.0),
        ({"solver": "reduced_rank", "rank": 12}, 0.99),
        ({"solver": "reduced_rank", "rank": 2}, 0.1),
    ],
)
def test_other_solvers(tmp_path, options, least):
    data = planted(tmp_path, affine)
    records = fitted(CLTMap(**widths(data), **options), data)
    found = value(records, "r2_delta")
    assert least < found < 1
    record = Results(records).select(quantity="r2_delta", control="none")[0]
    assert record.params["solver"] == options["solver"]
    assert record.params["k"] == options.get("rank")
    assert (record.params["lambda_"] is None) == (options["solver"] == "procrustes")


def test_procrustes_finds_a_rotation(tmp_path):
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    data = planted(tmp_path, lambda x, _: 2 * x @ rotation + 1)
    assert value(fitted(CLTMap(**widths(data), solver="procrustes"), data), "r2_delta") > 1 - 1e-9


def test_a_choice_at_the_edge_is_flagged(tmp_path):
    data = planted(tmp_path, affine)
    flagged = fitted(CLTMap(**widths(data), lambdas=(10.0, 1.0, 100.0)), data)
    chosen = [r for r in flagged if r.control not in ("identity", "mean_shift")]
    assert all("lambda_at_edge" in r.flags for r in chosen)
    noisy = planted(tmp_path / "noisy", lambda x, i: affine(x, i, noise=4.0))
    inside = fitted(CLTMap(**widths(noisy), lambdas=(1e-9, 0.3, 1e4)), noisy)
    assert not Results(inside).select(flags=("lambda_at_edge",), positions="user")
    single = fitted(CLTMap(**widths(data), lambdas=(1.0,)), data)
    assert not any(r.flags for r in single)


def test_a_matrix_of_sites(tmp_path):
    data = planted(tmp_path, affine, sites=3)
    module = CLTMap(**widths(data), matrix=True)
    records = fitted(module, data)
    cells = Results(records).select(matrix=True, positions="user")
    assert len(cells) == 9
    for record in cells:
        assert (record.value > 0.99) == (record.params["source_site"] == record.site)
    batch = data.read(data.rows("train", ["user"]))
    x, y = batch["source"]["resid_post.2"], batch["target"]["resid_post.1"]
    affine_map, params, _ = module.cross(2, 1, 1)
    expected = fit_ridge(x, y, params["lambda_"], shrink="zero").weight.float()
    torch.testing.assert_close(affine_map.weight, expected, atol=1e-5, rtol=1e-4)


def test_cross_layer_maps(tmp_path):
    data = planted(tmp_path, affine, source_sites=["resid_post.1", "resid_post.0"])
    records = fitted(CLTMap(**widths(data), source_sites=data.source_sites), data)
    assert value(records, "r2", source_site="resid_post.1") < 0.5


@pytest.mark.parametrize("matrix", [False, True])
def test_a_checkpoint_gives_the_same_records(tmp_path, matrix):
    data = planted(tmp_path, affine)
    options = {**widths(data), "matrix": matrix}
    runner = trainer()
    module = CLTMap(**options)
    runner.fit(module, datamodule=data)
    runner.save_checkpoint(tmp_path / "fitted.ckpt")
    runner.test(module, datamodule=data, verbose=False)
    again = CLTMap(**options)
    path = str(tmp_path / "fitted.ckpt")
    trainer().test(again, datamodule=data, ckpt_path=path, weights_only=True, verbose=False)
    assert list(again.records()) == list(module.records())
    assert fitted(CLTMap(**options), data) == list(module.records())
    for change in (
        {"shrink": "zero"},
        {"sites": data.sites[::-1]},
        {"lambdas": (1.0, 2.0)},
        {"sites": ["resid_post.0"]},
    ):
        with pytest.raises(CheckpointError, match="ckpt_path"):
            trainer().test(
                CLTMap(**{**options, **change}), datamodule=data, ckpt_path=path, weights_only=True
            )
    with pytest.raises(CheckpointError, match="class"):
        trainer().fit(CLTMapSGD(**widths(data)), datamodule=data, ckpt_path=path)


def test_epochs_and_batches_change_no_map(tmp_path):
    data = planted(tmp_path, affine)
    once, twice, small = (CLTMap(**widths(data)) for _ in range(3))
    fitted(once, data)
    fitted(twice, data, max_epochs=2)
    data.batch_size = 7
    fitted(small, data)
    for other in (twice, small):
        torch.testing.assert_close(once.mapped_weight, other.mapped_weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(once.shift, other.shift)


def test_nothing_fitted_is_not_tested(tmp_path):
    data = planted(tmp_path, affine)
    with pytest.raises(CheckpointError, match="--ckpt_path"):
        trainer().test(CLTMap(**widths(data)), datamodule=data)


def test_a_position_without_rows_is_named(tmp_path):
    data = planted(tmp_path, affine, positions=["user"])
    with pytest.raises(FitError, match=r"resid_post\.0, positions last .*model\.positions"):
        fitted(CLTMap(**widths(data)), data)
    records = fitted(CLTMap(**widths(data), positions=["user"]), data)
    assert {r.positions for r in records} == {"user"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, r"model\.rank is 3 with solver ridge"),
        ({"solver": "reduced_rank"}, r"model\.rank is None"),
        ({"solver": "reduced_rank", "rank": 5}, r"allowed: 1 to 4"),
        ({"lambdas": ()}, r"model\.lambdas"),
        ({"lambdas": (-1.0,)}, r"model\.lambdas"),
        ({"lambdas": (math.nan,)}, r"model\.lambdas"),
        ({"positions": ("first",)}, r"model\.positions"),
        ({"source_sites": ["resid_post.0"] * 3}, r"model\.source_sites"),
        ({"solver": "lasso"}, r"model\.solver"),
        ({"shrink": "mean"}, r"model\.shrink"),
    ],
)
def test_bad_settings_name_their_key(options, message):
    with pytest.raises(FitError, match=message) as error:
        CLTMap(["resid_post.0", "resid_post.1"], **{"d_source": 4, "d_target": 4, **options})
    assert "\n" not in str(error.value)
