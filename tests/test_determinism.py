"""The same seed gives the same records, bit for bit, whoever reads the rows; nearly so for other threads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workspace import config, run, small, workspace

THREADS = 1e-4
"""Most that a number of a record may move, or its share, where sums are taken by other numbers of threads."""
CLOSED, DESCENT = "clt_cultural", "clt_cultural_sgd"
MORE = {
    CLOSED: ["--data.batch_size=100"],
    DESCENT: ["--data.batch_size=100", "--layers=[1]", "--trainer.max_epochs=2", "--trainer.callbacks=[]"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pair, which gets its stores with the first fit."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("user")
    workspace(folder)
    return folder


@pytest.fixture(scope="module")
def closed(place: Path) -> list[dict[str, Any]]:
    """Return the records of a closed form with all that is measured of it."""
    return records(place, CLOSED)


def records(place: Path, name: str, *more: str) -> list[dict[str, Any]]:
    assert run("fit", *config(name), *small(place / "pair.yaml", place), *MORE[name], *more) == 0
    runs = (place / "runs" / name).iterdir()
    folder = max(runs, key=lambda path: int(path.name.partition("_")[2]))
    found = list(json.loads((folder / "results.json").read_text())["records"])
    assert sum(record["value"] is not None for record in found) > 10
    return found


def test_workers_change_nothing_in_a_closed_form(place: Path, closed: list[dict[str, Any]]) -> None:
    assert records(place, CLOSED, "--data.num_workers=2") == closed


def test_workers_change_nothing_in_a_descent(place: Path) -> None:
    first = records(place, DESCENT)
    assert records(place, DESCENT, "--data.num_workers=2") == first
    assert records(place, DESCENT, "--seed_everything=3") != first


def test_threads_change_last_digits_only(place: Path, closed: list[dict[str, Any]]) -> None:
    torch.set_num_threads(2)
    other = records(place, CLOSED)
    assert len(other) == len(closed)
    for one, two in zip(closed, other, strict=True):
        for name in one.keys() - {"value", "low", "high"}:
            assert one[name] == two[name]
        for name in ("value", "low", "high"):
            told = (one["quantity"], name)
            if one[name] is None or two[name] is None:
                assert one[name] is two[name], told
            else:
                assert one[name] == pytest.approx(two[name], rel=THREADS, abs=THREADS), told
