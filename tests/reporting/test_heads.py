"""Figures of heads say what the records say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import BarContainer
from PIL import Image
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from mechdiff.errors import ConfigError
from mechdiff.reporting.figures import drawable
from mechdiff.reporting.head_churn import plot_head_churn, rules_of
from mechdiff.reporting.head_curves import plot_cumulative, plot_head_overlap, plot_head_truth
from mechdiff.reporting.head_grafts import plot_head_grafts
from mechdiff.reporting.heads import by_head, how, plot_head_maps
from mechdiff.reporting.table import head_table, tables
from mechdiff.reporting.tensorboard import log_results, tagged
from mechdiff.results import Results
from tests.reporting.events import read
from tests.reporting.make_heads import CHANGED, HEADS, KS, LAYERS, MAIN, head_run, identical_run

PLOTS = [
    plot_head_maps,
    plot_head_churn,
    plot_head_overlap,
    plot_cumulative,
    plot_head_truth,
    plot_head_grafts,
]


@pytest.fixture(scope="module")
def results() -> Results:
    return head_run()


def texts(figure) -> str:
    inside = [t.get_text() for axes in figure.axes for t in axes.texts]
    return " ".join([*inside, figure._supxlabel.get_text().replace("\n", " ")])


def bars(axes) -> list[float]:
    return [b.get_height() for c in axes.containers if isinstance(c, BarContainer) for b in c]


@pytest.mark.parametrize("plot", PLOTS)
def test_a_figure_is_1200_pixels_wide(plot, results: Results, tmp_path: Path) -> None:
    figure = plot(results, tmp_path / "figures" / "figure.png")
    with Image.open(tmp_path / "figures" / "figure.png") as image:
        assert image.width == 1200
    assert "n = 48 prompts" in texts(figure)


@pytest.mark.parametrize("plot", PLOTS)
def test_nothing_to_draw_is_said(plot) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot(Results())


def test_a_run_offers_its_figures(results: Results) -> None:
    own = {"head_maps", "head_churn", "head_overlap", "head_cumulative", "head_truth", "head_grafts"}
    assert {name for name, *_ in drawable(results)} == own


def test_every_head_has_its_place_and_changed_ones_are_outlined(results: Results) -> None:
    figure = plot_head_maps(results)
    panels = [axes for axes in figure.axes if axes.images]
    for axes, model in zip(panels, ("base", "tuned", "pair"), strict=False):
        shown = np.asarray(axes.images[0].get_array())
        assert shown.shape == (HEADS, LAYERS)
        cells = by_head(results, quantity="head_attribution", model=model, **MAIN)
        assert all(shown[head, layer] == cells[layer, head].value for layer, head in cells)
    limits = [axes.images[0].get_clim() for axes in panels]
    assert limits[0] == limits[1]  # the two models share their colours
    assert limits[0][0] == -limits[0][1]
    outlined = {(round(p.get_x() + 0.5), round(p.get_y() + 0.5)) for p in panels[2].patches}
    assert outlined == set(CHANGED)
    own = np.asarray(panels[3].images[0].get_array())
    assert {(int(layer), int(head)) for head, layer in np.argwhere(own > 0)} == set(CHANGED)
    assert "miss completeness in layers 0, 1" in texts(figure)


def test_a_head_without_a_record_is_left_open(results: Results) -> None:
    kept = [r for r in results if r.site != "head_out.4"]  # a layer without softmax heads
    shown = np.asarray(plot_head_maps(Results(kept)).axes[0].images[0].get_array())
    assert np.isnan(shown[:, 4]).all()
    assert not np.isnan(shown[:, 5]).any()


def test_models_with_other_heads_are_drawn_but_not_compared(results: Results) -> None:
    apart = Results([r for r in results if r.quantity == "head_attribution" and r.model != "pair"])
    assert how(apart) == MAIN
    assert "not measured" in texts(plot_head_maps(apart))
    with pytest.raises(ConfigError, match="no head was compared"):
        plot_head_churn(apart)
    assert "head_churn" not in {name for name, *_ in drawable(apart)}


def test_churn_bars_floors_and_nulls(results: Results) -> None:
    figure = plot_head_churn(results)
    largest, rules, curve = figure.axes
    top = bars(largest)
    assert top[: len(CHANGED)] == sorted(CHANGED.values(), key=lambda v: -abs(v))
    assert [abs(v) for v in top] == sorted((abs(v) for v in top), reverse=True)
    assert sum(t.get_text() == "*" for t in largest.texts) == len(CHANGED)
    assert [0.5, 0.5] in [list(line.get_ydata()) for line in largest.lines]
    assert bars(rules) == pytest.approx([100 * v / 270 for v in (3, 9, 6, 11)] + [16.0])
    nulls = [line.get_ydata()[0] for line in rules.lines if line.get_marker() == "v"]
    assert nulls == pytest.approx([0.0, 0.1, 4.8])
    own = curve.lines[0]
    held = results.select(quantity="churn", floor_from="curve", control="none")
    assert list(own.get_ydata()) == pytest.approx([100 * r.value for r in held])
    assert list(own.get_xdata()) == [r.params["floor"] for r in held]
    assert "grows with the number of prompts" in texts(figure)
    assert "cognitive_smol − cultural_smol: +4.0 [1.0, 7.0] % of heads" in texts(figure)
    assert "One tuned model per kind" in texts(figure)


def test_a_floor_beyond_the_bars_is_named(results: Results) -> None:
    small = [
        replace(r, value=r.value / 10, low=r.low / 10, high=r.high / 10)
        if r.quantity == "head_attribution"
        else r
        for r in results
    ]
    assert "fixed floor of 0.5 nats is off the scale" in plot_head_churn(Results(small)).axes[0].get_title(
        "left"
    )


def test_identical_models_have_no_bar_and_no_share_of_nothing() -> None:
    same = identical_run()
    churn = plot_head_churn(same)
    assert "no head differs" in texts(churn)
    assert bars(churn.axes[1]) == [0, 0]
    assert [t.get_text() for t in churn.axes[1].texts] == ["0", "0"]
    curves = texts(plot_cumulative(same))
    assert curves.count("gap too small") == 3
    assert not np.asarray(plot_head_maps(same).axes[2].images[0].get_array()).any()


def test_too_few_prompts_are_named_in_place_of_every_bar(results: Results) -> None:
    lost = {"value": None, "low": None, "high": None, "reason": "too_few_prompts", "params": MAIN}
    kept = [r for r in results if not r.quantity.startswith("churn")]
    record = results.select(quantity="churn")[0]
    kept += [replace(record, quantity=q, **lost) for q in ("churn", "churn_p", "churn_bh")]
    few = Results(kept)
    figure = plot_head_churn(few)
    assert texts(figure).count("too few prompts") == 5
    assert bars(figure.axes[1]) == []
    assert head_table(few).row_count == 5


def test_shares_of_selected_heads_do_not_stand_among_those_of_all(results: Results) -> None:
    few = [
        replace(r, value=1.0, low=1.0, high=1.0, rows=6, params={**r.params, "group": "attribution"})
        for r in results
        if r.quantity in ("churn", "churn_p", "churn_bh", "concentration") and "head" not in r.params
    ]
    both = Results([*results, *few], results.provenance)
    assert rules_of(both) == rules_of(results)
    assert bars(plot_head_churn(both).axes[1]) == bars(plot_head_churn(results).axes[1])
    assert head_table(both).caption == head_table(results).caption


def test_rankings_stand_beside_chance_and_halves(results: Results) -> None:
    overlap, jaccard, rbo = plot_head_overlap(results).axes
    for axes, quantity in ((overlap, "topk_overlap"), (jaccard, "jaccard"), (rbo, "rbo")):
        marks = {"o": {"control": "none"}, "_": {"control": "chance"}}
        marks |= {m: {"control": "split_half", "model": model} for m, model in (("s", "base"), ("D", "pair"))}
        for marker, where in marks.items():
            drawn = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == marker]
            assert drawn == [r.value for r in results.select(quantity=quantity, **where)]
    assert [t.get_text() for t in overlap.get_xticklabels()] == ["5", "10", "20", "32"]


def test_the_curve_ends_at_all_heads(results: Results) -> None:
    figure = plot_cumulative(results)
    curve, areas = figure.axes
    assert [t.get_text() for t in curve.get_xticklabels()] == [str(k) for k in KS]
    lines = {line.get_label(): list(line.get_ydata()) for line in curve.lines}
    own = results.select(quantity="cumulative_effect", of="all_heads", control="none")
    assert lines["highest first"] == [r.value for r in own]
    assert lines["highest first"][-1] == lines["random order"][-1] == 1.0
    assert bars(areas) == [0.99, 0.06]
    assert [line.get_ydata()[0] for line in areas.lines if line.get_marker() == "v"] == [0.5, 0.5]
    assert "close 0.70 [0.60, 0.80] of the gap" in texts(figure)


def test_estimates_are_paired_with_the_truth_of_their_head(results: Results) -> None:
    figure = plot_head_truth(results)
    tuned = figure.axes[0]
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in tuned.lines if line.get_marker() == "o"}
    guesses = by_head(results, quantity="head_attribution", model="tuned", subset="patched", **MAIN)
    exact = by_head(results, quantity="head_attribution", model="tuned", **{**MAIN, "method": "patch"})
    assert points == {(guesses[place].value, r.value) for place, r in exact.items()}
    assert len(points) == 64
    every = by_head(results, quantity="head_attribution", model="tuned", **MAIN)
    assert all(guesses[place].value == pytest.approx(1.02 * every[place].value) for place in guesses)
    assert "may be over more prompts" not in texts(figure)
    assert "r = 0.93 [0.88, 0.98]" in texts(figure)
    assert "top-20 overlap = 0.90 [0.82, 0.98]" in texts(figure)
    assert "Overlap: of ranks among the 64 heads patched" in texts(figure)
    mixed = plot_head_truth(Results([r for r in results if "subset" not in r.params]))
    assert "Estimates may be over more prompts" in texts(mixed)
    one = Results([r for r in results if r.params.get("method") != "patch" or r.model == "tuned"])
    assert plot_head_truth(one).axes[1].get_title("left") == "The same, near 0"


def test_grafts_stand_in_the_order_of_own_change(results: Results) -> None:
    figure = plot_head_grafts(results)
    upper, lower = figure.axes
    changed = sorted(CHANGED, key=lambda place: -abs(CHANGED[place]))
    labels = [t.get_text() for t in lower.get_xticklabels()]
    assert labels[: len(changed)] == [f"{layer}.{head}" for layer, head in changed]
    assert bars(upper)[: len(changed)] == pytest.approx([0.3 * abs(CHANGED[place]) for place in changed])
    assert bars(lower)[: len(changed)] == pytest.approx([abs(CHANGED[place]) for place in changed])
    colours = [b.get_facecolor() for c in lower.containers if isinstance(c, BarContainer) for b in c]
    assert len(set(colours[: len(changed)])) == 1
    assert colours[0] not in colours[len(changed) :]  # heads drawn at random
    assert texts(figure).count("gap too small") == 1
    assert "share keys and values" in texts(figure)


def test_the_table_says_what_changed(results: Results) -> None:
    console = Console(width=100, record=True)
    for table in tables(results):
        console.print(table)
    said = console.export_text()
    for words in ("swapped labels", "0.033", "|z|", "0.99", "(tuned, twin): 0.93", "grows with the number"):
        assert words in said, words


def test_tensorboard_tells_heads_apart(results: Results, tmp_path: Path) -> None:
    tags = tagged(results)
    assert len(tags) == len(results)
    few = Results([r for r in results if r.site in (None, "head_out.17")])
    assert {"head_maps", "head_churn", "head_cumulative"} <= {name for name, *_ in drawable(few)}
    log_results(SummaryWriter(str(tmp_path)), few, {})
    scalars = read(tmp_path).Tags()
    assert any("head=17.3" in tag for tag in scalars["scalars"])
    curves = [tag for tag in scalars["scalars"] if tag.startswith("by_")]
    assert any(tag.startswith("by_k/rq4/cumulative_effect") for tag in curves)
    assert not [tag for tag in curves if "head=" in tag]
