"""Write the records of runs as one tidy table, for other tools."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from mechdiff.errors import ConfigError
from mechdiff.files import whole
from mechdiff.reporting.report.runs import Study, read_study
from mechdiff.results import Record

FORMATS = (".csv", ".parquet")
COLUMNS: dict[str, pa.DataType] = {
    "pair": pa.string(),
    "question": pa.string(),
    "quantity": pa.string(),
    "site": pa.string(),
    "positions": pa.string(),
    "model": pa.string(),
    "split": pa.string(),
    "control": pa.string(),
    "value": pa.float64(),
    "low": pa.float64(),
    "high": pa.float64(),
    "n": pa.int64(),
    "rows": pa.int64(),
    "unit": pa.string(),
    "reason": pa.string(),
    "flags": pa.string(),
    "params": pa.string(),
    "file": pa.string(),
}
"""Columns of the table; ``params`` is JSON, and ``flags`` are separated by spaces."""


def write_records(places: Sequence[str | Path], path: str | Path) -> Path:
    """Write every record of some runs, one per row, as CSV or Parquet.

    Args:
        places: Tables of results, folders of runs, or the folder of a study.
        path: File to write; its suffix says which format.

    Raises:
        ConfigError: If the format is not known, or a table cannot be read.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} ends in {path.suffix!r}; allowed: {' or '.join(FORMATS)} (key: --records)")
    table = pa.Table.from_pylist(list(_rows(read_study(places))), schema=pa.schema(list(COLUMNS.items())))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        (csv.write_csv if path.suffix == ".csv" else pq.write_table)(table, part)
    return path


def as_table(records: Iterable[Record], *columns: str) -> pa.Table:
    """Return records, one per row, for a look at them in a notebook.

    Args:
        records: Those of a run, or some of them: see `Results.select`.
        columns: Attributes of a record, or entries of its ``params``, as `Results.select` has them; all
            attributes by default.
    """
    names = columns or tuple(name for name in COLUMNS if name not in ("pair", "file"))
    rows = [record.params | _row(record) for record in records]
    return pa.table({name: pa.array([row.get(name) for row in rows], COLUMNS.get(name)) for name in names})


def _row(record: Record) -> dict[str, Any]:
    params = json.dumps(record.params, sort_keys=True, ensure_ascii=False)
    return asdict(record) | {"params": params, "flags": " ".join(record.flags)}


def _rows(study: Study) -> Iterator[dict[str, Any]]:
    held = [(p.name, str(run.path), run.results) for p in study.pairs for run in p.runs.values()]
    if len(study.contrasts):
        held.append((study.contrast_name, str(study.contrasts.provenance.get("file", "")), study.contrasts))
    for pair, file, results in held:
        for record in results:
            yield _row(record) | {"pair": pair, "file": file}
