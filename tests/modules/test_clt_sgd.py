import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from mechdiff.modules import CLTMap, CLTMapSGD
from mechdiff.results import Results
from tests.modules.planted import affine, fitted, planted, trainer, widths

RATE = {"learning_rate": 0.05, "weight_decay": 1e-4}


@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_descent_comes_close_to_the_closed_form(tmp_path, shrink):
    data = planted(tmp_path, affine)
    module, closed = CLTMapSGD(**widths(data), shrink=shrink, **RATE), CLTMap(**widths(data), shrink=shrink)
    records, exact = fitted(module, data, max_epochs=30), fitted(closed, data)
    for quantity in ("r2", "r2_delta"):
        where = {"quantity": quantity, "positions": "user", "control": "none", "site": "resid_post.0"}
        (found,), (best,) = (Results(r).select(**where) for r in (records, exact))
        assert found.value == pytest.approx(best.value, abs=0.01)
    where = {"quantity": "r2_delta", "positions": "user", "control": "shuffled"}
    assert max(r.value for r in Results(records).select(**where)) < 0.5
    torch.testing.assert_close(module.shift, closed.shift)


def test_it_starts_at_the_mean_shift(tmp_path):
    data = planted(tmp_path, affine)
    module = CLTMapSGD(**widths(data), learning_rate=0.0)
    fitted(module, data)
    for group in range(3):
        shift = module.affine(0, group, "mean_shift")
        for kind in ("mapped", "shuffled"):
            torch.testing.assert_close(module.affine(0, group, kind).weight, shift.weight)
            torch.testing.assert_close(module.affine(0, group, kind).bias, shift.bias)


def test_no_difference_and_no_variance_stay_finite(tmp_path):
    data = planted(tmp_path, lambda x, _: x.clone())
    module = CLTMapSGD(**widths(data), **RATE)
    records = fitted(module, data, max_epochs=2)
    assert torch.equal(module.affine(0, 0).weight, torch.eye(12))
    assert {r.reason for r in Results(records).select(quantity="r2_delta")} == {"gap_too_small"}


def test_resuming_equals_going_on(tmp_path):
    data = planted(tmp_path, affine)
    whole, first, rest = (CLTMapSGD(**widths(data), **RATE) for _ in range(3))
    records = fitted(whole, data, max_epochs=4)
    runner = trainer(max_epochs=2)
    runner.fit(first, datamodule=data)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    runner = trainer(max_epochs=4)
    runner.fit(rest, datamodule=data, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert torch.equal(rest.weight, whole.weight)
    assert torch.equal(rest.mapped_weight, whole.mapped_weight)
    runner.test(rest, datamodule=data, verbose=False)
    assert list(rest.records()) == records


def test_callbacks_watch_the_validation_loss(tmp_path):
    data = planted(tmp_path, affine)
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val/loss", save_top_k=1)
    stop = EarlyStopping("val/loss", patience=2)
    runner = trainer(max_epochs=30, callbacks=[keep, stop], enable_checkpointing=True)
    runner.fit(CLTMapSGD(**widths(data), learning_rate=0.5), datamodule=data)
    assert keep.best_model_path
    assert float(keep.best_model_score) == pytest.approx(float(stop.best_score))
    again = CLTMapSGD(**widths(data), learning_rate=0.5)
    trainer().test(again, datamodule=data, ckpt_path=keep.best_model_path, weights_only=True, verbose=False)
    assert all(r.value is not None for r in again.records())
