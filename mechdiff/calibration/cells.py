"""The table of a calibration: shares of trials, each with its exact interval and what is asked of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mechdiff.errors import ConfigError
from mechdiff.files import write_text
from mechdiff.functional.proportions import binomial_interval

FILE = "calibration.json"
Group = Literal["recall", "false_positives", "coverage", "power"]
Verdict = Literal["met", "within error", "missed", ""]


@dataclass(frozen=True)
class Cell:
    """A share of trials.

    Attributes:
        question: The research question whose method was tried, or ``intervals``.
        quantity: What the share is of: ``coverage``, ``power``, ``false_positives``, or what was to be found,
            such as ``onset_within_one``.
        method: What was tried.
        kind: On what.
        strength: How strong the planted difference was; None where there was none.
        prompts: Number of prompts of each trial.
        successes: Trials in which it happened.
        trials: All trials.
        estimate: Their ratio.
        low: Lower end of the exact binomial interval.
        high: Upper end.
        target: What is asked for: both ends of a range, or the least share; of false positives, the greatest.
            None where nothing is asked for.
        note: Why a target is missed, if it is.
    """

    question: str
    quantity: str
    method: str
    kind: str
    strength: float | None
    prompts: int
    successes: int
    trials: int
    estimate: float
    low: float
    high: float
    target: Sequence[float] | float | None = None
    note: str | None = None

    @classmethod
    def count(cls, successes: int, trials: int, **about: Any) -> Cell:
        """Make a cell of a count, with its exact interval.

        Args:
            successes: Trials in which it happened.
            trials: All trials.
            **about: The other attributes of the cell.
        """
        found = binomial_interval(successes, trials)
        about |= {"estimate": found.value, "low": found.low, "high": found.high}
        return cls(successes=successes, trials=trials, **about)

    @property
    def group(self) -> Group:
        """Which table it belongs to."""
        return next((g for g in ("false_positives", "coverage", "power") if g in self.quantity), "recall")

    @property
    def wanted(self) -> tuple[float, float] | None:
        """The range that is asked for."""
        if self.target is None or isinstance(self.target, Sequence):
            return None if self.target is None else (self.target[0], self.target[1])
        return (0.0, self.target) if self.group == "false_positives" else (self.target, 1.0)

    @property
    def verdict(self) -> Verdict:
        """Whether the estimate is in range; if it is not, whether its interval reaches it."""
        if self.wanted is None:
            return ""
        least, most = self.wanted
        if least <= self.estimate <= most:
            return "met"
        return "within error" if self.low <= most and self.high >= least else "missed"


@dataclass
class Calibration:
    """A table of calibration.

    Attributes:
        cells: Shares of trials.
        provenance: Versions, seed, base, repeats.
        numbers: What is no share, such as an angle: its median and quartiles, with what a cell has.
    """

    cells: list[Cell]
    provenance: dict[str, Any] = field(default_factory=dict)
    numbers: list[dict[str, Any]] = field(default_factory=list)


def write_calibration(table: Calibration, folder: str | Path) -> Path:
    """Write ``calibration.json``, whole or not at all.

    Args:
        table: The table.
        folder: Where to write; made if need be.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    body = json.dumps(asdict(table), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, body + "\n")
    return path


def read_calibration(folder: str | Path) -> Calibration:
    """Read ``calibration.json``.

    Raises:
        ConfigError: If the file is missing or not such a table.
    """
    path = Path(folder) / FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        cells = [Cell(**cell) for cell in body["cells"]]
        return Calibration(cells, dict(body["provenance"]), list(body.get("numbers", ())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read {path} as the table of a calibration: {error}") from error


def prompts_needed(cells: Iterable[Cell], power: float = 0.8) -> int | None:
    """Return the least number of prompts, of those tried, from which on the power suffices.

    Args:
        cells: Power of one method on differences of one kind and strength.
        power: Share of differences that shall be found.

    Returns:
        None if no number that was tried suffices.
    """
    found = None
    for cell in sorted(cells, key=lambda c: -c.prompts):
        if cell.estimate < power:
            break
        found = cell.prompts
    return found
