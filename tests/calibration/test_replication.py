"""What belongs to the seed of a training, and what to the prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mechdiff.__main__ import main
from mechdiff.calibration.replication import FILE, replicate
from mechdiff.errors import ConfigError
from mechdiff.results import Results
from tests.reporting.report.make_study import study

SEEDS = ("seed_17", "seed_1", "seed_2")


def change(table: Path, quantity: str, weights: str, **values: object) -> None:
    """Give a run the weights of another seed, and one of its numbers other values."""
    results = Results.read(table)
    results.records = [replace(r, **values) if r.quantity == quantity else r for r in results]
    results.provenance["models"]["tuned"]["weights"] = weights
    results.write(table)


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Three studies of one pair, whose churn and onset are known."""
    folders = []
    for number, name in enumerate(SEEDS):
        folder = study(tmp_path / name, ["cultural_smol"], ["rq1", "rq4"])
        churn = {"value": 0.2 + 0.1 * number, "low": 0.18 + 0.1 * number, "high": 0.22 + 0.1 * number}
        change(folder / "cultural_smol" / "rq4" / "results.json", "churn", name, **churn)
        onset = {"value": 12 + 2 * number, "site": f"resid_post.{12 + 2 * number}"}
        change(folder / "cultural_smol" / "rq1" / "results.json", "patch_onset", name, **onset)
        folders.append(folder)
    return folders


def test_spread_between_seeds_stands_beside_that_within_runs(seeds: list[Path]) -> None:
    found = replicate(seeds)
    (churn,) = found.select(quantity="churn")
    assert (churn.value, churn.low, churn.high) == pytest.approx((0.3, 0.2, 0.4))
    assert churn.params["sd_between"] == pytest.approx(0.1)
    assert churn.params["sd_within"] == pytest.approx(0.02 / 1.959964, rel=1e-6)
    assert churn.params["sd_seed"] == pytest.approx((0.1**2 - (0.02 / 1.959964) ** 2) ** 0.5, rel=1e-6)
    assert [churn.params["seeds"][name]["value"] for name in SEEDS] == pytest.approx([0.2, 0.3, 0.4])
    (onset,) = found.select(quantity="patch_onset")
    assert (onset.value, onset.low, onset.high) == (14, 12, 16)
    assert "sd_seed" not in onset.params  # an onset has no interval, so nothing can be taken off
    assert not found.select(quantity="minimal_k_90")  # rq3 was not run


def test_what_all_of_the_prompts_could_do_is_not_the_seeds(seeds: list[Path]) -> None:
    for folder in seeds:
        table = folder / "cultural_smol" / "rq4" / "results.json"
        change(table, "churn", folder.name, low=0.0, high=0.8)
    (churn,) = replicate(seeds).select(quantity="churn")
    assert churn.params["sd_seed"] == 0.0
    assert churn.params["sd_between"] > 0


def test_a_number_that_one_seed_alone_has_is_no_spread(seeds: list[Path]) -> None:
    for folder in seeds[1:]:
        table = folder / "cultural_smol" / "rq1" / "results.json"
        change(table, "patch_onset", folder.name, value=None, site=None, reason="below_floor")
    (onset,) = replicate(seeds).select(quantity="patch_onset")
    assert (onset.value, onset.reason) == (None, "too_few_seeds")
    assert onset.params["seeds"]["seed_1"]["reason"] == "below_floor"


def test_only_replicas_are_compared(seeds: list[Path], tmp_path: Path, capsys) -> None:
    with pytest.raises(ConfigError, match="needs at least 2 seeds"):
        replicate(seeds[:1])
    for question in ("rq1", "rq4"):
        change(seeds[1] / "cultural_smol" / question / "results.json", "nothing", SEEDS[0])
    with pytest.raises(ConfigError, match="seed_17 and seed_1 hold the same tuned model"):
        replicate(seeds)
    other = study(tmp_path / "other", ["cognitive_smol"], ["rq1"])
    with pytest.raises(ConfigError, match="cognitive_smol and cultural_smol"):
        replicate([seeds[0], other])
    assert main(["replicate", *map(str, seeds)]) == 2
    assert "the same tuned model" in capsys.readouterr().err


def test_the_command_writes_records_that_can_be_read(seeds: list[Path], tmp_path: Path, capsys) -> None:
    assert main(["replicate", *map(str, seeds), "--out", str(tmp_path)]) == 0
    assert "churn: 0.2 to 0.4, mean 0.3 fraction; sd between 0.1" in capsys.readouterr().out
    found = Results.read(tmp_path / FILE)
    assert found.provenance["pair"] == "cultural_smol"
    assert str(tmp_path) not in (tmp_path / FILE).read_text(encoding="utf-8")
