"""The comparison on a CPU runs at tiny size, results agree, and its goals are judged and drawn."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.cpu import analysis
from benchmarks.cpu.__main__ import PARTS, main
from benchmarks.cpu.arithmetic import Cost
from benchmarks.peer import NotMeasured, Peer
from benchmarks.plot import draw_goals
from benchmarks.shapes import write_pair
from benchmarks.turns import Turn, in_turn, ratio
from mechdiff.interventions.hooks import get_blocks
from mechdiff.pairs.loading import load_pair
from mechdiff.study import read_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pair")
    return write_pair(folder, "tiny", "cpu", "float32", 300, 20)


def test_parts_without_other_tools(pair: Path, tmp_path: Path) -> None:
    parts = ["extraction", "pair", "reading", "sweeps", "heads"]
    options = ["--tiny", "--pair", str(pair), "--out", str(tmp_path), "--peers", str(tmp_path / "none")]
    lines = main([*options, "--parts", *parts])
    assert results.read(tmp_path / "results.jsonl") == lines
    found = {line["what"]: line for line in lines}
    missing = [what for what, line in found.items() if "not_measured" in line["figures"]]
    assert [what.rpartition(" ")[2] for what in missing] == ["nnsight", "transformer_lens"]
    made = found["extraction, all positions, to disk"]
    assert made["figures"]["hidden_states_relative_difference"] < 1e-5
    assert set(made["ratios"]) == {"hidden_states", "seed_loop", "time_over_bare_forward"}
    assert found["sweep of 24 edits, last positions"]["figures"]["largest_logit_difference"] < 1e-4
    assert found["exact patching of all heads, 1 prompt"]["figures"]["heads"] == 16
    assert all(line["limit"] for line in lines if line["ratios"])
    assert not list(tmp_path.glob("mechdiff-bench-*"))
    text = results.tables(lines)
    assert "### Goals" in text
    assert "not measured" in text
    draw_goals(lines, tmp_path / "goals.svg")
    assert "times the goal" in (tmp_path / "goals.svg").read_text()
    assert set(parts) < set(PARTS)


def test_a_worker_does_the_work_and_agrees(tmp_path: Path) -> None:
    """Ridge maps and CKA of another tool, in a process of its own, on rows of known sums."""
    import h5py

    draws = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=draws)
    y = x @ torch.randn(6, 6, generator=draws) + 0.1 * torch.randn(40, 6, generator=draws)
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["source/0"], file["target/0"] = x.numpy(), y.numpy()
    job = {"path": str(tmp_path / "rows.h5"), "layers": [0], "some": [0], "lambdas": list(analysis.GRID)}
    with Peer("sklearn", job, tmp_path, Path(sys.executable)) as peer:
        assert peer.turn().seconds > 0
        found = peer.result
    sums = analysis.Moments.of(x, y)
    own = analysis.Moments.of(y, y)
    assert abs(analysis.cka_from_sums(sums.xy, sums.xx, own.xx) - found["cka"][0, 0]) < 1e-12
    path = analysis.ridge_path(sums, analysis.GRID, shrink="zero")
    place = min(range(9), key=lambda i: abs(analysis.GRID[i] / float(found["lambdas"][0]) - 1))
    assert (path.map(place).weight - found["weights"][0]).abs().max() < 1e-6


def test_a_tool_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match="make bench"):
        Peer("captum", {}, tmp_path, tmp_path / "python")
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho no such tool >&2\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(NotMeasured, match="no such tool"):
        Peer("captum", {}, tmp_path, script)
    shutil.rmtree(tmp_path / "peer-captum")


def test_ways_are_run_in_turn() -> None:
    order = []

    def way(name: str, seconds: float):
        return lambda: order.append(name) or Turn(seconds, seconds / 2)

    found = in_turn({"a": way("a", 1.0), "b": way("b", 4.0), "c": way("c", 9.0)}, 3, {"c": 1})
    assert order == ["a", "b", "c", "b", "a", "a", "b"]
    assert ratio(found["c"], found["a"], 5.0, 2.0)["value"] == 18.0
    assert ratio(found["b"], found["a"], 5.0)["rounds"] == 3


@pytest.mark.parametrize(
    ("value", "more", "verdict"),
    [(3.6, {}, True), (3.4, {}, False), (1.0, {"at_most": True}, True), (3.6, {"at_most": True}, False)],
)
def test_goals_are_judged(value: float, more: dict, verdict: bool) -> None:
    one = {"value": value, "low": value, "high": value, "goal": 3.5, **more}
    assert results.met(one) is verdict
    line = results.measurement("cpu", "row", {"seconds": 1.0}, over_it=one) | {"limit": "the reason"}
    text = results.targets([line])
    assert ("**missed**" in text) is not verdict
    assert ("the reason" in text) is not verdict
    assert results.met({"value": value, "goal": 3.5}) is None


def test_operations_are_those_of_the_matrix_products(pair: Path) -> None:
    base = load_pair(read_pair(pair)).base
    cost = Cost(base)
    weights = sum(p.numel() for b in get_blocks(base.model) for p in b.parameters() if p.ndim == 2)
    assert cost.forward([1], heads=0) == 2 * weights + 4 * base.depth * cost.width
    assert cost.forward([1]) - cost.forward([1], heads=0) == 2 * 49408 * 32
    assert cost.forward([5, 3], base.depth / 2, 0) == cost.forward([5, 3], heads=0) / 2
