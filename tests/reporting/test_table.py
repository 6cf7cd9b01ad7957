"""The table says what the records say."""

import io

import pytest
from rich.console import Console

from mechdiff.errors import ConfigError
from mechdiff.reporting.table import summary
from mechdiff.results import Record, Results
from tests.reporting.make import map_run


def text_of(results: Results, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary(results))
    return console.export_text()


def test_one_row_per_site_and_position() -> None:
    table = summary(map_run([12, 19]))
    assert table.row_count == 2 * 4
    assert list(table.columns[1].cells) == ["last", "user", "template", "all"] * 2


def test_numbers_intervals_and_gaps() -> None:
    def record(quantity: str, value: float | None, **more) -> Record:
        where = {"site": "resid_post.3", "positions": "last"}
        return Record("rq2", quantity, value, n=7, unit="fraction", **where, **more)

    results = Results(
        [
            record("r2", 0.99957),
            record("r2_delta", -0.126, low=-0.2, high=0.05, flags=("lambda_at_edge",)),
            record("kl_raw", 0.0031, low=0.0025, high=0.0041, split="eval"),
            record("kl_mapped", None, reason="gap_too_small", split="eval"),
        ]
    )
    cells = [next(iter(column.cells)) for column in summary(results).columns]
    expected = ["resid_post.3", "last", "0.9996", "−0.13†\n\\[−0.20, 0.05]", "–"]
    assert cells == [*expected, "0.0031\n\\[0.0025, 0.0041]", "gap too small"]
    printed = text_of(results)
    assert "[−0.20, 0.05]" in printed
    assert "† lambda at edge" in printed
    assert "n = last: 7 prompts (map)" in printed


def test_it_fits_eighty_columns() -> None:
    assert "0.5" in text_of(map_run([12, 19, 22, 26]))
    lines = text_of(map_run([12, 19, 22, 26])).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("resid_post.19 template" in line for line in lines)


def test_nothing_to_show_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^nothing to show: no record of r2 or .* of a map run$"):
        summary(Results())
