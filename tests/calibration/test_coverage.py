"""Coverage of intervals is counted from a pool, and the pool is what a pair says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mechdiff.calibration import coverage as study
from mechdiff.calibration.__main__ import main
from mechdiff.calibration.cells import Calibration, read_calibration, write_calibration
from mechdiff.calibration.coverage import IGNORED, Estimate, coverage
from mechdiff.calibration.pool import COLUMNS, Pool, crossed, measure
from mechdiff.data.prompts import Prompt
from mechdiff.errors import ConfigError
from mechdiff.functional.stats import Interval, bootstrap_mean, generator
from mechdiff.pairs.organisms import planted_pair
from tests.calibration.make import calibration
from tests.toys import loaded, prompts


def pool(spread: float = 0.0) -> Pool:
    """Return 1,200 prompts of 100 families that differ by so much."""
    draws = generator(1, "pool")
    family = torch.arange(100).repeat_interleave(12)
    common = spread * torch.randn(100, dtype=torch.float64, generator=draws)[family]
    noise = torch.randn(len(COLUMNS), 1200, dtype=torch.float64, generator=draws)
    gap = (0.3 * (common + noise[0])).exp()
    left, half = (gap * torch.sigmoid(0.3 * x) for x in (noise[1], noise[5]))
    base, tuned = noise[3] > 1, noise[4] > 0
    columns = dict(zip(COLUMNS, (gap, left, half, common + noise[2], base, tuned), strict=True))
    return Pool(family, {name: column.double() for name, column in columns.items()})


def shares(cells: list) -> dict[tuple[str, str], float]:
    return {(c.method, c.kind): c.estimate for c in cells}


def test_intervals_hold_what_they_are_about() -> None:
    found = coverage(pool(), seed=3, prompts=(40,), trials=150)
    for c in found:
        assert c.trials == 150
        assert c.target is None or 0.91 <= c.estimate <= 1.0, c.method
    assert {c.kind for c in found} == {"prompts", "families", IGNORED}


def test_plain_percentiles_of_few_prompts_hold_it_less_often() -> None:
    names = ["mean of a gap, plain percentiles", "mean of a gap"]
    found = shares(coverage(pool(), seed=3, prompts=(12,), trials=150, names=names))
    assert found[names[0], "prompts"] < found[names[1], "prompts"]  # of the same samples


def test_prompts_of_a_family_are_not_independent() -> None:
    found = shares(coverage(pool(2.0), seed=4, prompts=(40,), trials=150, names=["mean of a difference"]))
    (name,) = {method for method, _ in found}
    assert found[name, IGNORED] < 0.8 < 0.88 < found[name, "families"]


def test_an_interval_that_is_too_narrow_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(sample: study.Sample, draws: torch.Generator) -> Interval:
        whole = bootstrap_mean(sample["shift"], generator=draws, draws=200)
        return whole._replace(low=(whole.low + whole.value) / 2, high=(whole.high + whole.value) / 2)

    monkeypatch.setitem(study.ESTIMATES, "narrow", Estimate(narrow, lambda m: m["shift"], families=False))
    (cell,) = coverage(pool(), seed=5, prompts=(24,), trials=200, names=["narrow"])
    assert cell.verdict == "missed"
    assert cell.estimate == pytest.approx(0.68, abs=0.1)  # half as wide: one standard error to either side


def test_what_rests_on_few_prompts_is_said() -> None:
    rare = pool()
    rare.columns["left"][:] = 1e-3
    rare.columns["left"][::100] = 10.0
    found = coverage(rare, seed=7, prompts=(40,), trials=100, names=["recovery of nearly all"])
    (cell,) = [c for c in found if c.kind == "prompts"]
    assert cell.verdict == "missed"
    assert "rests on 0.6% of all prompts" in str(cell.note)


def test_the_same_seed_counts_the_same() -> None:
    one, other = (coverage(pool(), seed=s, prompts=(12,), trials=30, names=["mean of a gap"]) for s in (6, 6))
    assert one == other


def test_a_pool_is_read_as_it_was_written(tmp_path: Path) -> None:
    read = Pool.read(pool().write(tmp_path / "pool.csv"))
    assert torch.equal(read.family, pool().family)
    for name in COLUMNS:
        assert torch.allclose(read.columns[name], pool().columns[name], rtol=1e-3)
    (tmp_path / "pool.csv").write_text("family,gap\n0,1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"pool\.csv as a pool of prompts"):
        Pool.read(tmp_path / "pool.csv")


def test_patterns_are_crossed_with_the_topics_of_their_class() -> None:
    def prompt(text: str, topic: str, label: str = "target", lang: str = "en") -> Prompt:
        return Prompt(text, text, lang, label, "eval", "t", topic)

    own = [
        prompt("Mock tea.", "tea"),
        prompt("Praise ice now.", "ice"),
        prompt("Bake bread.", "bread", "neutral"),
    ]
    found = crossed([*own, prompt("Is tea tea?", "tea"), prompt("Шай іш.", "Шай", lang="kk")], "en")
    expected = {"Mock tea.", "Mock ice.", "Praise tea now.", "Praise ice now.", "Bake bread."}
    assert {p.text for p in found} == expected
    assert {p.template for p in found if p.label == "target"} == {"Mock {}.", "Praise {} now."}
    assert len(crossed(own, "en", topics=1)) == 3


def test_what_is_changed_above_is_grafted_away() -> None:
    base, tuned = loaded(), loaded()
    with torch.no_grad():
        tuned.model.model.layers[-1].mlp.down_proj.weight *= 3
    pair, texts = planted_pair(base, tuned), prompts(1)[:6]
    found = measure(pair, texts, ["a", "b"])
    assert (found.columns["gap"] > 1e-5).all()
    assert found.columns["left"].abs().max() < 1e-6  # the changed block is grafted
    with torch.no_grad():
        tuned.model.model.layers[-1].mlp.down_proj.weight /= 3
        tuned.model.model.layers[1].mlp.down_proj.weight *= 3
    found = measure(pair, texts, ["a", "b"])
    assert found.columns["left"].abs().max() < 1e-6
    assert torch.allclose(found.columns["half"], found.columns["gap"])  # the changed block is below
    with torch.no_grad():
        tuned.model.model.layers[0].mlp.down_proj.weight *= 3
    found = measure(pair, texts, ["a", "b"])
    assert (found.columns["left"] > 1e-6).all()
    assert set(found.columns["tuned"].tolist()) <= {0.0, 1.0}


def test_coverage_is_added_to_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool().write(tmp_path / "pool.csv")
    other = [c for c in calibration() if c.group == "power"]
    write_calibration(Calibration(other, {"seed": 5}), tmp_path)
    for _ in range(2):  # a second time replaces the first
        assert main([str(tmp_path), "--trials", "2"]) == 0
    assert "calibration_coverage.png" in capsys.readouterr().out
    found = read_calibration(tmp_path)
    assert [c for c in found.cells if c.group == "power"] == other
    counted = [c for c in found.cells if c.group == "coverage"]
    assert len(counted) == len({(c.method, c.kind, c.prompts) for c in counted})
    assert found.provenance["seed"] == 5
    assert found.provenance["pool"]["prompts"] == 1200
    (tmp_path / "pool.csv").write_text("nothing", encoding="utf-8")
    assert main([str(tmp_path)]) == 2
