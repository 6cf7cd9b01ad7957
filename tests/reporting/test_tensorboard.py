"""What TensorBoard reads back is what the records say."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mechdiff.reporting.tensorboard import log_results, tagged
from mechdiff.results import Record, Results
from tests.reporting.make import map_run

TAG = "rq2/resid_post.19/r2_delta/last"


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


@pytest.mark.parametrize("kind", ["lightning", "writer"])
def test_scalars_figures_curves_and_hyperparameters(kind: str, tmp_path: Path) -> None:
    results = map_run([12, 19])
    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    log_results(logger if kind == "lightning" else SummaryWriter(str(tmp_path)), results, step=3)
    events = read(tmp_path)
    value = results.select(quantity="r2_delta", site="resid_post.19", positions="last", control="none")[
        0
    ].value
    scalars = events.Scalars(TAG)
    assert [(s.step, round(s.value, 5)) for s in scalars] == [(3, round(value, 5))]
    assert "rq2/resid_post.19/kl_mapped/last/wrong_layer" in events.Tags()["scalars"]
    assert "rq2/resid_post.12/r2_delta/last" not in events.Tags()["scalars"]  # gap too small
    assert {"figures/clt", "figures/patch"} == set(events.Tags()["images"])
    curve = events.Scalars("rq2_by_layer/resid_post/kl_raw/last/value")
    assert [s.step for s in curve] == [12, 19]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    plugins = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"pair/name" in plugins
    assert TAG.encode() in events.SummaryMetadata("_hparams_/experiment").plugin_data.content


def test_no_logger_or_a_dummy_logs_nothing(tmp_path: Path) -> None:
    log_results(None, map_run([3]))
    log_results(DummyLogger(), map_run([3]))


def test_another_logger_receives_the_scalars(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    log_results(logger, map_run([19]), step=2)
    logger.save()
    assert TAG in (tmp_path / "metrics.csv").read_text()


def test_tags_tell_records_apart_by_what_differs() -> None:
    record = {"question": "rq3", "quantity": "steer_effect", "value": 0.1, "n": 4, "unit": "pp"}
    records = [Record(**record, params={"k": k, "alpha": 1.0}) for k in (1, 2)]
    records.append(Record(**record, params={"k": 2, "alpha": 1.0}, split="dev", model="tuned"))
    assert list(tagged(Results(records))) == [
        "rq3/model/steer_effect/k=1",
        "rq3/model/steer_effect/k=2",
        "rq3/model/steer_effect/tuned",
    ]
