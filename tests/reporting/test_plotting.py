"""The figures say what the records say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.colors import same_color, to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from PIL import Image

from mechdiff.errors import ConfigError
from mechdiff.reporting.panels import COLOURS
from mechdiff.reporting.plotting import plot_clt_bars, plot_patch_bars
from mechdiff.results import Record, Results
from tests.reporting.make import map_run

LAYERS = {1: [20], 4: [12, 19, 22, 26], 10: list(range(2, 30, 3))}


def heights(figure: Figure, panel: int) -> list[float]:
    containers = [c for c in figure.axes[panel].containers if isinstance(c, BarContainer)]
    return [round(bar.get_height(), 9) for c in containers for bar in c]


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in axes.texts]


@pytest.mark.parametrize("count", LAYERS)
@pytest.mark.parametrize("plot", [plot_clt_bars, plot_patch_bars])
def test_a_figure_is_1200_pixels_wide(plot, count: int, tmp_path: Path) -> None:
    out = tmp_path / "figures" / "figure.png"
    figure = plot(map_run(LAYERS[count]), out)
    with Image.open(out) as image:
        assert image.width == 1200
    assert all(axes.get_xlabel() == "layer (resid_post)" and axes.get_ylabel() for axes in figure.axes)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == [str(n) for n in LAYERS[count]]


def test_every_bar_is_a_record_and_keeps_its_sign() -> None:
    results = map_run(LAYERS[4])
    expected = [r.value for r in results.select(quantity="r2_delta", control="none") if r.value is not None]
    found = heights(plot_clt_bars(results), 0)
    assert found == [round(v, 9) for v in expected]
    assert min(found) < 0 < max(found)


def test_bars_are_coloured_by_position_and_colours_differ() -> None:
    figure = plot_clt_bars(map_run(LAYERS[1]))
    colours = [c[0].get_facecolor() for c in figure.axes[0].containers if isinstance(c, BarContainer)]
    expected = [COLOURS[g] for g in ("last", "user", "template")]
    assert [to_hex(c).upper() for c in colours] == expected
    assert not same_color(COLOURS["last"], COLOURS["all"])


def test_a_missing_value_is_named_and_not_drawn_as_zero() -> None:
    results = map_run(LAYERS[4])
    figure = plot_clt_bars(results)
    assert texts(figure).count("gap too small") == 3
    assert len(heights(figure, 0)) == 3 * 3
    assert 0 not in heights(figure, 0)


def test_a_control_far_off_is_an_arrow_with_its_number() -> None:
    figure = plot_clt_bars(map_run(LAYERS[1]))
    assert len([t for t in texts(figure) if re.fullmatch(r"−3\.\d", t)]) == 3
    low, high = figure.axes[0].get_ylim()
    assert -1 < low < 0
    assert high < 1


def test_a_bar_far_below_zero_is_clipped_with_its_number() -> None:
    results = map_run(LAYERS[1])
    far = [
        replace(r, value=-40.0, low=-50.0, high=-30.0)
        if (r.quantity, r.control) == ("r2_delta", "none")
        else r
        for r in results
    ]
    figure = plot_clt_bars(Results(far))
    assert figure.axes[0].get_ylim()[0] > -4
    assert texts(figure).count("−40") == 3


def test_raw_r2_is_logarithmic_in_what_is_left() -> None:
    axes = plot_clt_bars(map_run(LAYERS[4])).axes[1]
    assert axes.get_yscale() == "log"
    assert axes.yaxis_inverted()
    labels = axes.yaxis.get_major_formatter()
    assert labels(0.05, 0) == "0.95"
    assert labels(10.0, 0) == "−9"


def test_perfect_r2_stands_at_the_edge_and_says_so() -> None:
    whole = [
        replace(r, value=1.0, low=1.0, high=1.0) if r.quantity == "r2" else r for r in map_run(LAYERS[1])
    ]
    assert texts(plot_clt_bars(Results(whole))).count("> 0.99999") == 3


def test_divergence_is_logarithmic_only_over_a_wide_range() -> None:
    wide = plot_patch_bars(map_run(LAYERS[4]))
    assert {axes.get_yscale() for axes in wide.axes[:2]} == {"log"}
    near = [replace(r, value=0.5, low=0.4, high=0.6) if r.unit == "nats" else r for r in map_run(LAYERS[4])]
    narrow = plot_patch_bars(Results(near))
    assert {axes.get_yscale() for axes in narrow.axes[:2]} == {"linear"}
    assert narrow.axes[0].get_ylim()[0] < 0 < narrow.axes[0].get_ylim()[1]


def test_the_reduction_stands_at_each_step() -> None:
    assert texts(plot_patch_bars(map_run(LAYERS[4]))).count("−65 %") == 3


def test_the_caption_counts() -> None:
    caption = plot_clt_bars(map_run(LAYERS[4])).get_supxlabel().replace("\n", " ")
    assert "last: 131 prompts; user: 131 prompts, 2,711 rows" in caption
    assert "Pair cultural_smol." in caption
    assert "Self-patch: at most 1e-07 nats." in plot_patch_bars(map_run(LAYERS[4])).get_supxlabel()


def test_only_what_was_measured_has_a_panel() -> None:
    some = [r for r in map_run(LAYERS[4]) if r.quantity != "effect_correlation" and r.positions != "all"]
    assert len(plot_patch_bars(Results(some)).axes) == 2


def test_a_cross_layer_matrix_does_not_hide_the_maps_own_layer() -> None:
    own = Record("rq2", "r2_delta", 0.5, 10, "fraction", site="resid_post.3", positions="last")
    other = replace(own, value=0.1, params={"source_site": "resid_post.1"})
    assert heights(plot_clt_bars(Results([other, own])), 0) == [0.5]


@pytest.mark.parametrize("plot", [plot_clt_bars, plot_patch_bars])
def test_nothing_to_draw_is_one_line(plot) -> None:
    with pytest.raises(ConfigError, match=r"^nothing to draw: no record of .* results\.json of a map run$"):
        plot(Results())
