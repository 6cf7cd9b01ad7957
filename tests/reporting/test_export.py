"""Records as a table for other tools hold what the results hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mechdiff.__main__ import main
from mechdiff.reporting.export import COLUMNS, as_table, write_records
from mechdiff.results import Results
from tests.reporting.report.make_study import study


def test_every_record_is_a_row(tmp_path: Path) -> None:
    folder = study(tmp_path / "study")
    rows = pq.read_table(write_records([folder], tmp_path / "records.parquet")).to_pylist()
    tables = {path: Results.read(path) for path in sorted(folder.rglob("*.json"))}
    assert len(rows) == sum(map(len, tables.values()))
    table = folder / "cultural_smol" / "rq2" / "results.json"
    own = [row for row in rows if row["file"] == str(table)]
    for row, record in zip(own, tables[table], strict=True):
        assert (row["value"], row["low"], row["high"]) == (record.value, record.low, record.high)
        assert (row["quantity"], row["site"], row["n"]) == (record.quantity, record.site, record.n)
        assert json.loads(row["params"]) == record.params
        assert row["reason"] == record.reason
    assert {row["pair"] for row in rows} == {
        "cultural_smol",
        "cognitive_smol",
        "cultural_smol and cognitive_smol",
    }


def test_the_command_writes_it_beside_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = study(tmp_path, ("cultural_smol",), ("rq2",)) / "cultural_smol" / "rq2"
    file = tmp_path / "records.csv"
    assert main(["report", str(run), "--no-figures", "--records", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    with file.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == len(Results.read(run / "results.json"))
    assert {row["pair"] for row in rows} == {"cultural_smol"}
    missing = [row for row in rows if row["reason"]]
    assert missing
    assert all(row["value"] == "" for row in missing)


def test_records_are_shown_with_the_columns_asked_for(tmp_path: Path) -> None:
    run = study(tmp_path, ("cultural_smol",), ("rq2",)) / "cultural_smol" / "rq2"
    records = Results.read(run / "results.json").select(quantity="r2_delta")
    rows = as_table(records, "site", "lambda_", "value", "n").to_pylist()
    assert rows == [
        {"site": r.site, "lambda_": r.params.get("lambda_"), "value": r.value, "n": r.n} for r in records
    ]
    assert records
    assert as_table(records).column_names == [name for name in COLUMNS if name not in ("pair", "file")]
    assert as_table([], "site", "head").to_pylist() == []


def test_another_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = study(tmp_path, ("cultural_smol",), ("rq2",))
    assert main(["report", str(run), "--records", str(tmp_path / "records.xlsx")]) == 2
    assert "allowed: .csv or .parquet (key: --records)" in capsys.readouterr().err
