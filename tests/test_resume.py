"""Training that was stopped goes on as if it had not been."""

import json
from pathlib import Path

import pytest
import torch

from tests.workspace import config, run, small, workspace


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pair file."""
    torch.set_num_threads(1)
    return workspace(tmp_path_factory.mktemp("user"))


def fit(pair: Path, root: Path, epochs: int, *more: object) -> Path:
    options = [*config("clt_cultural_sgd"), *small(pair, root), "--data.batch_size=100", "--layers=[1]"]
    assert run("fit", *options, f"--trainer.max_epochs={epochs}", *more) == 0
    return sorted((root / "runs" / "clt_cultural_sgd").iterdir())[-1]


def test_a_resumed_fit_is_the_uninterrupted_one(pair: Path, tmp_path: Path) -> None:
    whole = fit(pair, tmp_path, 4)
    half = fit(pair, tmp_path, 2)
    resumed = fit(pair, tmp_path, 4, "--ckpt_path", half / "checkpoints" / "last.ckpt")
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (whole, half, resumed)
    ]
    assert [state["epoch"] for state in states] == [3, 1, 3]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[2]["state_dict"][name]), name  # to the last bit
    assert not torch.equal(states[0]["state_dict"]["weight"], states[1]["state_dict"]["weight"])
    written = [json.loads((folder / "results.json").read_text())["records"] for folder in (whole, resumed)]
    assert written[0] == written[1]


def test_early_stopping_and_the_best_checkpoint(pair: Path, tmp_path: Path) -> None:
    folder = fit(pair, tmp_path, 30, "--model.learning_rate=0.5")
    kept = {path.name: torch.load(path, weights_only=True) for path in folder.glob("checkpoints/*.ckpt")}
    assert set(kept) == {"best.ckpt", "last.ckpt"}
    assert kept["last.ckpt"]["epoch"] < 29
    assert kept["best.ckpt"]["epoch"] <= kept["last.ckpt"]["epoch"]
