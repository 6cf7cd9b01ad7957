"""Figures of handles say what the records say."""

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mechdiff.errors import ConfigError
from mechdiff.reporting.figures import drawable
from mechdiff.reporting.handles import plot_head_paths, plot_monitor, plot_transfer_matrix
from mechdiff.reporting.report.content import Citations
from mechdiff.reporting.report.handle import measured
from mechdiff.reporting.report.runs import Pair, Run
from mechdiff.reporting.report.view import View
from mechdiff.reporting.steering import _tested, handle_site, plot_alpha_curves, plot_effect_vs_k
from mechdiff.reporting.table import handle_table
from mechdiff.results import QUANTITIES, Record, Results
from tests.reporting.make_steering import ALPHAS, KS, SITE, steering_run

PLOTS = [plot_effect_vs_k, plot_alpha_curves, plot_transfer_matrix, plot_monitor, plot_head_paths]


@pytest.fixture(scope="module")
def results() -> Results:
    return steering_run()


def texts(figure) -> str:
    return " ".join(t.get_text() for axes in figure.axes for t in axes.texts)


@pytest.mark.parametrize("plot", PLOTS)
def test_a_figure_is_1200_pixels_wide(plot, results: Results, tmp_path: Path) -> None:
    plot(results, tmp_path / "figures" / "figure.png")
    with Image.open(tmp_path / "figures" / "figure.png") as image:
        assert image.width == 1200


@pytest.mark.parametrize("plot", PLOTS)
def test_nothing_to_draw_is_said(plot) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot(Results())


def test_a_run_offers_its_figures(results: Results) -> None:
    names = {name for name, *_ in drawable(results)}
    assert {"effect_vs_k", "alpha_curves", "transfer", "monitor", "head_paths"} <= names
    assert not names & {"clt", "divergence"}
    assert not list(drawable(Results()))


def test_effects_stand_at_their_rank_with_the_random_range(results: Results) -> None:
    recovery, effect, bpb, pp = plot_effect_vs_k(results).axes
    assert [t.get_text() for t in recovery.get_xticklabels()] == [str(k) for k in KS]
    held = results.select(quantity="interchange_recovery", edit="mapped", split="eval")
    drawn = [list(line.get_ydata()) for line in recovery.lines]
    assert [r.value for r in held] in drawn
    tops = {(round(b.get_y(), 6), round(b.get_y() + b.get_height(), 6)) for b in recovery.patches}
    random = results.select(quantity="interchange_recovery", control="random")
    assert tops == {(round(r.value, 6), round(r.high, 6)) for r in random}
    assert "none feasible" in texts(recovery.figure)
    drawn = [list(line.get_ydata()) for line in bpb.lines]
    assert [pytest.approx(k) for k in KS] in drawn  # a share becomes percent
    assert [5.0, 5.0] in drawn
    assert [pytest.approx(0.4 * k) for k in KS] in [list(line.get_ydata()) for line in pp.lines]
    assert "log-odds" in effect.get_title(loc="left")


def test_curves_hold_every_alpha_and_ring_the_chosen_one(results: Results) -> None:
    interchange = plot_alpha_curves(results).axes[0]
    curves = [line for line in interchange.lines if len(line.get_xdata()) == len(ALPHAS)]
    assert len(curves) == len(KS)
    rings = [line.get_xdata()[0] for line in interchange.lines if line.get_markersize() == 8]
    assert rings == [1.0] * len(KS)


def test_a_matrix_names_what_it_cannot_say(results: Results) -> None:
    figure = plot_transfer_matrix(results)
    said = texts(figure)
    assert said.count("gap too small") == 2 * 3
    assert said.count("0.35") >= 4
    assert "[0.75, 0.85]" in said


def test_the_site_is_that_of_the_chosen_handle(results: Results) -> None:
    other = Record("rq3", "chosen_handle", 2.0, 80, "directions", site="resid_post.5", params={"edit": "add"})
    assert handle_site(results) == SITE
    assert handle_site(Results([other])) == "resid_post.5"
    assert handle_site(Results()) is None


def test_heads_are_sorted_by_what_they_carry(results: Results) -> None:
    left, right = plot_head_paths(results).axes
    heights = [abs(bar.get_height()) for bar in left.patches]
    assert heights == sorted(heights, reverse=True)
    assert sum(bar.get_height() for bar in right.patches) == 64
    assert "head_path_effect" in QUANTITIES["rq3"]


def test_costs_under_a_gate_are_not_the_handles_own(results: Results) -> None:
    assert len(results.select(gate="linear")) == 2
    for quantity in ("side_effect_bpb", "side_effect_pp"):
        assert all("gate" not in r.params for r in _tested(results, quantity))
    printed = io.StringIO()
    params = {"edit": "mapped", "k": 4, "alpha": 1.0, "metric": "refusal_logodds", "fitted_on": "kk"}
    about = {"site": SITE, "split": "eval", "positions": "last", "params": params}
    foreign = Record("rq3", "transfer_effect", -0.888, 24, "fraction", **about)
    both = Results([*results.records, foreign], results.provenance)
    Console(file=printed, width=200).print(handle_table(both))
    assert "77.7" not in printed.getvalue()
    assert "0.89" not in printed.getvalue()
    view = View(Pair("cultural_smol", {"rq3": Run(Path("results.json"), results, "a run")}), Citations())
    assert measured(view, "side_effect_pp", "mapped")[4].value == 1.6
