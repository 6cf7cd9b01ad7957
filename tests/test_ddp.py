"""Two processes do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.workspace import ROOT, config, run, small, workspace

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pair file."""
    torch.set_num_threads(1)
    return workspace(tmp_path_factory.mktemp("user"))


def call(script: list[str], *options: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_extraction_and_training(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["--data.batch_size=8", "--trainer.max_epochs=3", "--layers=[1]", "--data.positions=[user]"]
    fit += ["--model.positions=[user]", "--model.learning_rate=0.01"]
    one, two = (
        [*config("clt_cultural_sgd"), *small(pair, tmp_path / name), "--extraction.batches_per_shard=1"]
        for name in ("one", "two")
    )
    assert run("fit", *one, *fit) == 0
    shown = call(["-m", "mechdiff", "extract"], *two, "--layers=[1]", *TWO)
    assert [line.partition(":")[0] for line in shown.splitlines()] == ["source", "target"]
    shards = [sorted((tmp_path / name / "stores").rglob("*.h5")) for name in ("one", "two")]
    assert len(shards[0]) >= 2
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]

    shown = call([str(ROOT / "train.py")], *two, *fit, *TWO)
    said, again = shown.strip().splitlines()[-2:]
    assert said == "Fitted by 2 processes. Test with one:"
    script, *options = again.removeprefix("python ").split()
    assert script == "evaluate.py"
    capsys.readouterr()
    assert run("test", *options) == 0
    runs = [tmp_path / name / "runs" / "clt_cultural_sgd" for name in ("one", "two")]
    tables = [json.loads(next(folder.glob("*/results.json")).read_text())["records"] for folder in runs]
    r2 = [
        [r["value"] for r in table if (r["quantity"], r["control"]) == ("r2_delta", "none")]
        for table in tables
    ]
    assert len(r2[0]) == len(r2[1]) == 1
    # Two processes see twice as large a batch at half as many steps: near, not the same.
    assert r2[0] == pytest.approx(r2[1], abs=0.1)
