"""Figures and tables of where two models differ say what the records say."""

import io
from pathlib import Path

import pytest
from matplotlib.container import BarContainer
from PIL import Image
from rich.console import Console

from mechdiff.errors import ConfigError
from mechdiff.reporting.behaviour import behaviours, plot_behaviour_bars
from mechdiff.reporting.divergence import (
    plot_divergence_curve,
    plot_divergence_matrix,
    plot_layer_patch,
)
from mechdiff.reporting.figures import drawable
from mechdiff.reporting.run import write_run
from mechdiff.reporting.table import tables
from mechdiff.reporting.tensorboard import tagged
from mechdiff.results import Record, Results
from tests.reporting.make import divergence_run

PLOTS = [plot_divergence_curve, plot_divergence_matrix, plot_layer_patch, plot_behaviour_bars]


@pytest.fixture(scope="module")
def results() -> Results:
    return divergence_run(list(range(0, 30, 2)))


def written(results: Results) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    for table in tables(results):
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("layers", [[3], [0, 2, 4], list(range(0, 30, 2))])
def test_a_figure_is_1200_pixels_wide(plot, layers: list[int], tmp_path: Path) -> None:
    plot(divergence_run(layers), tmp_path / "figures" / "figure.png")
    with Image.open(tmp_path / "figures" / "figure.png") as image:
        assert image.width == 1200


@pytest.mark.parametrize("plot", PLOTS)
def test_nothing_to_draw_is_said(plot) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot(Results())


def test_a_curve_is_one_minus_cka(results: Results) -> None:
    axes = plot_divergence_curve(results).axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "debiased"]
    records = results.select(quantity="cka_debiased", model="pair")
    records = [r for r in records if set(r.params) == {"source_site"}]
    assert list(line.get_ydata()) == pytest.approx([1 - r.value for r in records])
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [28, 26]


def test_patch_bars_are_records_and_missing_ones_are_named(results: Results) -> None:
    figure = plot_layer_patch(results)
    held = results.select(
        quantity="patch_recovery", control="none", direction="into_tuned", positions="last", prompts="curve"
    )
    bars = [bar.get_height() for c in figure.axes[0].containers if isinstance(c, BarContainer) for bar in c]
    for r in held:
        assert any(abs(h - r.value) < 1e-9 for h in bars) or r.value is None
    assert "gap too small" in [t.get_text() for t in figure.axes[1].texts]


def test_effects_stand_beside_their_controls(results: Results) -> None:
    axes = plot_layer_patch(results).axes[2]
    beside = {line.get_marker(): line.get_ydata()[0] for line in axes.lines if line.get_marker() in "Dv"}
    assert beside == {"D": -0.7, "v": 0.1}
    heights = [bar.get_height() for c in axes.containers if isinstance(c, BarContainer) for bar in c]
    assert heights == [-2.0] * 4


def test_behaviours_are_given_by_model_without_masking(results: Results) -> None:
    cells = behaviours(results, "refusal_rate")
    assert set(cells) == {"en target", "en neutral"}
    assert {m: r.value for m, r in cells["en target"].items()} == {"base": 0.05, "tuned": 0.9}
    figure = plot_behaviour_bars(results)
    assert "Not measured: toxicity." in figure._supxlabel.get_text()
    assert all("n = " in t.get_text() for axes in figure.axes for t in axes.get_xticklabels())


def test_the_tables_name_what_matters(results: Results) -> None:
    text = written(results)
    for said in ("resid_post.28 *", "onset, base's state put into tuned, last: layer 14", "rank the layers"):
        assert said in text
    assert "refusal rate" in text
    assert "0.90" in text


def test_a_run_leaves_its_figures(results: Results, tmp_path: Path) -> None:
    write_run(results, [], tmp_path, None, Console(quiet=True))
    names = {"divergence.png", "divergence_matrix.png", "layer_patch.png", "behaviour.png"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == names
    assert [file for _, file, _ in drawable(results)] == [
        "divergence.png",
        "divergence_matrix.png",
        "layer_patch.png",
        "behaviour.png",
    ]
    assert len(tagged(results)) == len(results)


def test_a_pair_of_unequal_widths_is_told() -> None:
    about = {"question": "rq1", "unit": "fraction", "split": "eval", "n": 0, "reason": "unequal_widths"}
    lost = [Record(quantity="patch_recovery", value=None, site=f"resid_post.{i}", **about) for i in range(3)]
    assert not list(drawable(Results(lost)))
    text = written(Results([*lost, *divergence_run([1]).records]))
    assert "widths differ" in text
