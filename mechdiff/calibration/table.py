"""Write the table of a calibration and its page, with where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechdiff.calibration.cases import CLEAR_NATS, TUNING_SEED, Case
from mechdiff.calibration.cells import FILE, read_calibration, write_calibration
from mechdiff.calibration.report import INTERVALS, POOL, write
from mechdiff.calibration.run import case_of, read_lines
from mechdiff.calibration.score import CLOSE_DEGREES, table


def write_table(folder: Path, seed: int, cases: Sequence[Case]) -> list[Path]:
    """Judge the lines of a folder and write the table.

    Args:
        folder: Where the lines are, and where the table goes.
        seed: Of the calibration.
        cases: Those that count; others in the folder do not.

    Returns:
        The files.
    """
    wanted = set(cases)
    lines = sorted((line for line in read_lines(folder) if case_of(line) in wanted), key=case_of)
    found = table(lines)
    found.provenance = _provenance(lines, seed)
    if (folder / FILE).is_file():  # what was counted without models stays, and where it comes from
        before = read_calibration(folder)
        found.cells += [c for c in before.cells if c.question == INTERVALS]
        found.provenance |= {name: value for name, value in before.provenance.items() if name == POOL}
    return [write_calibration(found, folder), *write(folder)]


def _provenance(lines: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Describe what the lines were measured with: who judges them needs no model, and may do so elsewhere."""
    return {
        **_common([line["software"] for line in lines]),
        "seed": seed,
        "tuning_seed": TUNING_SEED,
        "seeds": "thresholds and defaults were looked at with tuning_seed only; no draw depends on both",
        "base": sorted({line["base"] for line in lines}),
        "devices": sorted({line["device"] for line in lines}),
        "cases": len(lines),
        "cpu_seconds": round(sum(line["cpu_seconds"] for line in lines)),
        "clear_nats": CLEAR_NATS,
        "close_degrees": CLOSE_DEGREES,
    }


def _common(described: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what descriptions have in common as it is, and as a list what they do not."""
    found: dict[str, list[Any]] = {}
    for description in described:
        for name, value in description.items():
            values = found.setdefault(name, [])
            values += [value] if value not in values else []
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
