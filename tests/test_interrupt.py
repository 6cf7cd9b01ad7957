"""Ctrl-C and a cluster that takes the machine away: a run ends at once, and the same command goes on."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import count
from pathlib import Path

import pytest
import torch

from mechdiff.__main__ import main
from mechdiff.callbacks.sweep_effects import Targets
from mechdiff.extraction.extractor import Extractor
from mechdiff.modules import CLTMap, CLTMapSGD
from tests.torture import works
from tests.workspace import SWEEP, called, config, run, small, workspace

SECONDS, PATIENCE = 2.0, 60.0
"""How soon a run has to end: processor time, and time on a machine that has much else to do."""
BATCHES = ["--extraction.tokens_per_batch=128", "--extraction.batches_per_shard=3"]
KEPT = called("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/loss", save_last=True)
FIT = ["--layers=[1]", "--data.batch_size=100", "--trainer.max_epochs=3", "--ckpt_path=last"]
FIT += [KEPT]
SWEEPS = ["--layers=[1]", called("mechdiff.callbacks.Steering", **SWEEP)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pair file."""
    torch.set_num_threads(1)
    return workspace(tmp_path_factory.mktemp("user"))


@pytest.fixture(autouse=True)
def listens() -> Iterator[None]:
    """Heed Ctrl-C, which a shell has a process in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the environment of a job; return the file that says what was asked of the cluster."""
    asked = tmp_path / "asked.txt"
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    numbers = {"NTASKS": 1, "JOB_ID": 4242, "JOB_NAME": "fit", "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in numbers.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return asked


def told_at(
    step: Callable[..., object], number: int, *signals: int
) -> tuple[Callable[..., object], list[float]]:
    """Return a step that sends signals to its own process the `number`th time, and when it did."""
    steps, when = count(), []

    @wraps(step)
    def stepped(self: object, *args: object) -> object:
        found = step(self, *args)
        if next(steps) == number:
            when.extend((time.process_time(), time.monotonic()))
            for each in signals:
                os.kill(os.getpid(), each)
        return found

    return stepped, when


def ends_soon(when: list[float]) -> None:
    assert time.process_time() - when[0] < SECONDS
    assert time.monotonic() - when[1] < PATIENCE


def extract(pair: Path, root: Path) -> int:
    try:
        return main(["extract", *config(), *small(pair, root), *BATCHES])
    except SystemExit as left:
        return int(left.code or 0)


def fit(pair: Path, root: Path) -> int:
    return run("fit", *config("clt_cultural_sgd"), *small(pair, root), *FIT)


def files(root: Path) -> dict[str, bytes]:
    found = sorted((root / "stores").rglob("*.h5"))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def outcome(root: Path) -> tuple[object, dict[str, torch.Tensor]]:
    folder = max((root / "runs" / "clt_cultural_sgd").iterdir(), key=lambda path: int(path.name[8:]))
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return json.loads((folder / "results.json").read_text())["records"], state


@pytest.fixture(scope="module")
def fitted(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted fit."""
    root = tmp_path_factory.mktemp("whole")
    assert fit(pair, root) == 0
    return root


def same(root: Path, other: Path) -> None:
    (records, state), (wanted, weights) = outcome(root), outcome(other)
    assert records == wanted
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in state)


def test_ctrl_c_ends_an_extraction(pair: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    whole, root = tmp_path / "whole", tmp_path / "cut"
    assert extract(pair, whole) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        step, when = told_at(Extractor.predict_step, 9, signal.SIGINT)
        patch.setattr(Extractor, "predict_step", step)
        assert extract(pair, root) == 130
    ends_soon(when)
    said = capsys.readouterr().err
    assert said == "mechdiff: interrupted; what is complete is kept, and the same command goes on\n"
    kept = {path: path.stat().st_mtime_ns for path in root.rglob("*.h5")}
    assert 1 <= len(kept) < len(files(whole))
    assert not list(root.rglob("*.part"))
    assert extract(pair, root) == 0
    assert files(root) == files(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_ctrl_c_ends_a_fit(pair: Path, fitted: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        step, when = told_at(CLTMapSGD.training_step, 10, signal.SIGINT)
        patch.setattr(CLTMapSGD, "training_step", step)
        assert fit(pair, tmp_path) == 130
    ends_soon(when)
    assert "mechdiff: interrupted; " in capsys.readouterr().err
    assert not list(tmp_path.rglob("results.json"))
    assert fit(pair, tmp_path) == 0
    same(tmp_path, fitted)


def test_ctrl_c_ends_a_sweep(pair: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def sweep(root: Path) -> int:
        return run("fit", *config("steering_cultural"), *small(pair, root), *SWEEPS)

    def table(root: Path) -> list[object]:
        (path,) = (root / "runs").rglob("results.json")
        return list(json.loads(path.read_text())["records"])

    whole, root = tmp_path / "whole", tmp_path / "cut"
    assert sweep(whole) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        step, when = told_at(Targets._logits, 20, signal.SIGINT)
        patch.setattr(Targets, "_logits", step)
        assert sweep(root) == 130
    ends_soon(when)
    assert "mechdiff: interrupted; " in capsys.readouterr().err
    assert not list(root.rglob("results.json"))
    assert sweep(root) == 0
    assert len(table(whole)) > 10
    assert table(root) == table(whole)


def test_ctrl_c_ends_a_study(pair: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    whole, root = tmp_path / "whole", tmp_path / "cut"
    configs = works.plain_configs(tmp_path / "configs")
    assert works._study(pair, configs, whole) == 0
    with monkeypatch.context() as patch:
        step, when = told_at(CLTMap.training_step, 0, signal.SIGINT)
        patch.setattr(CLTMap, "training_step", step)
        assert works._study(pair, configs, root) == 130
    ends_soon(when)
    assert "tiny rq2: interrupted; the same command goes on from it" in capsys.readouterr().out
    first = (root / "study" / "tiny" / "rq1" / "results.json").stat().st_mtime_ns
    assert works._study(pair, configs, root) == 0
    assert (root / "study" / "tiny" / "rq1" / "results.json").stat().st_mtime_ns == first
    assert works._tables(root) == works._tables(whole)


def test_a_cluster_that_takes_the_machine_away_from_an_extraction(
    pair: Path, tmp_path: Path, cluster: Path, monkeypatch
) -> None:
    whole, root = tmp_path / "whole", tmp_path / "cut"
    assert extract(pair, whole) == 0
    with monkeypatch.context() as patch:
        step, when = told_at(Extractor.predict_step, 9, signal.SIGUSR1, signal.SIGTERM)
        patch.setattr(Extractor, "predict_step", step)
        assert extract(pair, root) == 143
    ends_soon(when)
    assert cluster.read_text() == "requeue 4242\n"
    assert 1 <= len(list(root.rglob("*.h5"))) < len(files(whole))
    assert extract(pair, root) == 0
    assert files(root) == files(whole)
    assert not list(Path.cwd().iterdir()), "what Lightning saves is not left for another run to resume"


def test_a_cluster_that_takes_the_machine_away_from_a_fit(
    pair: Path, fitted: Path, tmp_path: Path, cluster: Path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        step, when = told_at(CLTMapSGD.training_step, 10, signal.SIGUSR1, signal.SIGTERM)
        patch.setattr(CLTMapSGD, "training_step", step)
        assert fit(pair, tmp_path) == 143
    ends_soon(when)
    assert cluster.read_text() == "requeue 4242\n"
    assert fit(pair, tmp_path) == 0
    same(tmp_path, fitted)
    assert not list(Path.cwd().iterdir())
