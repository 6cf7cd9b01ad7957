"""The page and figures of a calibration say what its table says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mechdiff.calibration.cells import (
    FILE,
    Calibration,
    Cell,
    prompts_needed,
    read_calibration,
    write_calibration,
)
from mechdiff.calibration.figures import (
    plot_coverage,
    plot_power,
    plot_recall,
    plot_strength,
    power_cells,
    strength_cells,
)
from mechdiff.calibration.report import how_many_prompts, write
from mechdiff.errors import ConfigError
from tests.calibration.make import PROMPTS, STRENGTHS, calibration


def cell(successes: int, **about: object) -> Cell:
    given = {"quantity": "power", "method": "m", "kind": "k", "strength": 1.0, "prompts": 40, "target": 0.9}
    return Cell.count(successes, 100, **{"question": "rq1", **given, **about})


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_calibration(Calibration(calibration(), {"seed": 5}), tmp_path)
    read = read_calibration(tmp_path)
    cells, provenance = read.cells, read.provenance
    assert [c.estimate for c in cells] == [c.estimate for c in calibration()]
    assert [c.verdict for c in cells] == [c.verdict for c in calibration()]
    assert provenance == {"seed": 5}
    (tmp_path / FILE).write_text('{"cells": [{"question": "rq1"}], "provenance": {}}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"calibration\.json"):
        read_calibration(tmp_path)


@pytest.mark.parametrize(
    ("quantity", "successes", "target", "verdict"),
    [
        ("onset", 95, 0.95, "met"),
        ("onset", 93, 0.95, "within error"),
        ("onset", 80, 0.95, "missed"),
        ("false_positives", 5, 0.05, "met"),
        ("false_positives", 8, 0.05, "within error"),
        ("false_positives", 20, 0.05, "missed"),
        ("coverage", 100, (0.93, 0.97), "within error"),
        ("coverage", 95, (0.93, 0.97), "met"),
        ("coverage", 84, (0.93, 0.97), "missed"),
        ("power", 10, None, ""),
    ],
)
def test_a_target_is_missed_only_where_the_interval_does_not_reach_it(
    quantity: str, successes: int, target: object, verdict: str
) -> None:
    assert cell(successes, quantity=quantity, target=target).verdict == verdict


def test_enough_prompts_are_enough_for_all_larger_numbers_too() -> None:
    powers = {12: 82, 24: 70, 40: 85, 80: 99}
    cells = [cell(power, prompts=n) for n, power in powers.items()]
    assert prompts_needed(cells) == 40  # 82 of 100 with 12 was luck: 24 find fewer
    assert prompts_needed(cells, power=0.995) is None


def test_stronger_differences_need_fewer_prompts() -> None:
    found = {c.strength: n for c, n in how_many_prompts(calibration())}
    assert list(found) == list(STRENGTHS)
    assert found[0.25] is None or found[0.25] > found[0.5] > found[1.0] >= found[2.0] == PROMPTS[0]


def test_the_page_holds_every_cell_and_says_what_is_missed(tmp_path: Path) -> None:
    angle = {
        "question": "rq4",
        "quantity": "largest_angle",
        "method": "svd",
        "kind": "policy",
        "strength": 1.0,
    }
    angle |= {"prompts": 40, "n": 12, "median": 3.25, "quartiles": [2.5, 4.0], "unit": "degrees"}
    origin = {"base": ["smol", "tiny"], "seed": 5, "versions": {"torch": "2"}}
    write_calibration(Calibration(calibration(), origin, [angle]), tmp_path)
    written = write(tmp_path, figures="images")
    page = written[0].read_text(encoding="utf-8")
    for c in calibration():
        assert f"{100 * c.estimate:.1f} [{100 * c.low:.1f}, {100 * c.high:.1f}]" in page
    assert re.search(r"\| max test \| copy \|.*\| 8/200 \|.*\| ≤ 5 \| met \|", page)
    assert re.search(r"\| max test \| labels swapped \|.*\*within error\* \|", page)
    assert "Every difference counts with enough prompts." in page
    assert "base: `smol, tiny` · seed: `5` · versions: `torch 2`" in page
    assert "| largest angle | svd | policy | 1 | 40 | 12 | 3.25 [2.5, 4] | degrees |" in page
    assert page.count("![") == 4
    for line in page.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).is_file()
    tables = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert min(tables) >= 7
    with Image.open(tmp_path / "images" / "calibration_power.png") as image:
        assert image.width == 1200


def test_a_point_is_a_cell() -> None:
    figure = plot_power(calibration())
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    values = [c.estimate for c in calibration() if c.quantity == "power" and c.strength == 1.0]
    assert any(list(y) == values for y in drawn.values())
    assert len(plot_coverage(calibration()).axes) == 2
    titles = [a.get_title("left").replace("\n", " ") for a in plot_recall(calibration()).axes]
    assert titles == ["rq1: onset within one, patch", "rq1: onset within one, graft"]
    (axes,) = plot_strength(calibration()).axes
    usual = [c.estimate for c in calibration() if c.quantity == "power" and c.prompts == PROMPTS[-1]]
    assert any(list(line.get_ydata()) == usual for line in axes.lines)


def test_a_kind_of_all_ranks_is_not_drawn_beside_each() -> None:
    about = {"question": "rq3", "quantity": "power", "method": "svd", "strength": 1.0}
    sizes = [("policy", 8), ("policy_1", 8), ("policy_1", 16), ("policy_2", 8)]
    cells = [Cell.count(1, 2, kind=kind, prompts=n, **about) for kind, n in sizes]
    assert [(c.kind, c.prompts) for c in strength_cells(cells)] == [("policy_1", 8), ("policy_2", 8)]
    assert [(c.kind, c.prompts) for c in power_cells(cells)] == [("policy_1", 8), ("policy_1", 16)]


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    only = [c for c in calibration() if c.group == "coverage"]
    for plot in (plot_power, plot_recall, plot_strength):
        with pytest.raises(ConfigError, match="nothing to draw"):
            plot(only)
    write_calibration(Calibration(only), tmp_path)
    assert [p.name for p in write(tmp_path)] == ["calibration.md", "calibration_coverage.png"]
    (tmp_path / FILE).write_text(json.dumps({"provenance": {}, "cells": []}), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no cell"):
        write(tmp_path)
