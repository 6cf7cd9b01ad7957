"""The picture of grafts: a bar per block, its parts beside it, and the way from base to tuned."""

import pytest

from mechdiff.errors import ConfigError
from mechdiff.reporting.figures import drawable
from mechdiff.reporting.grafts import plot_graft_bars
from mechdiff.results import Record, Results

ABOUT = {"question": "rq1", "n": 24, "split": "eval", "positions": "last"}


def records(way: bool = True, effects: bool = True, missing: bool = False) -> list[Record]:
    found = []
    for direction in ("base_into_tuned", "tuned_into_base"):
        for layer in range(4):
            for kind, share in (("block", 1.0), ("attn", 0.75), ("mlp", 0.25)):
                value = None if missing else share * layer / 4
                said = {"reason": "gap_too_small"} if missing else {"low": value - 0.1, "high": value + 0.1}
                params = {"component": f"{kind}.{layer}", "direction": direction}
                cell = {**ABOUT, **said, "unit": "fraction", "params": params, "site": f"resid_post.{layer}"}
                found.append(Record(quantity="graft_recovery", value=value, **cell))
    for lambda_ in (0.0, 0.5, 1.0) if way else ():
        for model, value in (("base", lambda_), ("tuned", 1 - lambda_)):
            params = {"lambda_": lambda_, "reference": model}
            cell = {**ABOUT, "low": value, "high": value, "unit": "nats", "params": params}
            found.append(Record(quantity="interpolation_kl", value=value, **cell))
        for label in ("target", "neutral") if effects else ():
            params = {"lambda_": lambda_, "metric": "refusal_logodds", "label": label}
            cell = {**ABOUT, "low": 0.0, "high": 2.0, "unit": "nats", "params": params}
            found.append(Record(quantity="interpolation_effect", value=lambda_, **cell))
    return found


@pytest.mark.parametrize(("way", "effects"), [(True, True), (True, False), (False, False)])
def test_blocks_parts_and_the_way_are_drawn(way, effects, tmp_path):
    figure = plot_graft_bars(Results(records(way, effects), {}), tmp_path / "grafts.png")
    bars = [axes for axes in figure.axes if axes.get_xlabel() == "block"]
    assert [[round(bar.get_height(), 3) for bar in axes.patches] for axes in bars] == [
        [0, 0.25, 0.5, 0.75]
    ] * 2
    marks = sorted(line.get_ydata()[0] for line in bars[0].lines if len(line.get_xdata()) == 1)
    assert marks == sorted(share * layer / 4 for layer in range(4) for share in (0.75, 0.25))
    lines = [axes for axes in figure.axes if axes.get_xlabel() == "λ"]
    assert len(lines) == way + effects
    if way:
        assert [list(line.get_ydata()) for line in lines[0].lines[::2]] == [[0, 0.5, 1], [1, 0.5, 0]]
    assert (tmp_path / "grafts.png").stat().st_size > 10_000


def test_a_gap_too_small_is_said():
    figure = plot_graft_bars(Results(records(missing=True), {}))
    assert {text.get_text() for axes in figure.axes for text in axes.texts} == {"gap too small"}


def test_it_is_drawn_when_there_are_grafts_and_only_then():
    assert "grafts" in {name for name, *_ in drawable(Results(records(), {}))}
    assert "grafts" not in {name for name, *_ in drawable(Results([], {}))}
    with pytest.raises(ConfigError, match="no graft of a block"):
        plot_graft_bars(Results([], {}))
