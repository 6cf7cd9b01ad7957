"""Read runs and sort their records by pair and question."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechdiff.errors import ConfigError
from mechdiff.reporting.cells import pair_name
from mechdiff.results import Record, Results

QUESTIONS = {
    "rq1": "where they differ",
    "rq2": "whether a linear map carries base's states to tuned's",
    "rq3": "how small the causal handle is",
    "rq4": "which heads were rewired",
}
CONTRASTS = "contrasts.json"
"""Table of the numbers that compare pairs, beside the folders of the pairs."""
TABLE = "results.json"
STUDY = "study.json"
"""What a folder of a study says of itself."""


@dataclass(frozen=True)
class Run:
    """The table of one run, where it lies, and what a report calls that place."""

    path: Path
    results: Results
    name: str

    @property
    def question(self) -> str:
        """The question that most of its records answer; empty if it has none."""
        counted = Counter(r.question for r in self.results)
        return max(counted, key=lambda q: counted[q], default="")


@dataclass
class Pair:
    """What is known of one pair.

    Attributes:
        name: Its name.
        runs: The run that answers each question.
    """

    name: str
    runs: dict[str, Run] = field(default_factory=dict)

    def select(self, question: str, **where: Any) -> list[Record]:
        """Return the records of a question whose attributes or parameters equal all of `where`."""
        run = self.runs.get(question)
        return run.results.select(question=question, **where) if run else []

    def one(self, question: str, **where: Any) -> Record | None:
        """Return the first record of a question that matches, None if there is none."""
        return next(iter(self.select(question, **where)), None)

    def records(self) -> Iterator[Record]:
        """Yield every record."""
        for run in self.runs.values():
            yield from run.results

    @property
    def missing(self) -> list[str]:
        """The questions without a run."""
        return [question for question in QUESTIONS if question not in self.runs]

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from, of the first run."""
        return next((run.results.provenance for run in self.runs.values()), {})

    @property
    def spec(self) -> dict[str, Any]:
        """The pair file, empty if the run does not hold it."""
        pair = self.provenance.get("pair")
        return pair if isinstance(pair, dict) else {}

    def file(self, question: str) -> str:
        """Return the table that answers a question, as it is named in the report."""
        return self.runs[question].name if question in self.runs else ""


@dataclass
class Study:
    """What a report is drawn from: pairs, and numbers that compare them."""

    pairs: list[Pair]
    contrasts: Results = field(default_factory=Results)
    quick: bool = False

    @property
    def contrast_name(self) -> str:
        """Whose the contrasts are, as the report names them."""
        return " and ".join(pair.name for pair in self.pairs)


def read_study(places: Sequence[str | Path], beside: str | Path | None = None) -> Study:
    """Read tables of results, folders of runs, or the folder of a study.

    Args:
        places: Files and folders; a folder is searched for tables.
        beside: Folder from which a report names the tables, so that it tells nothing of this machine.

    Raises:
        ConfigError: If there is no table, one cannot be read, or two answer the same question of a pair.
    """
    if not places:
        raise ConfigError("no run is given; give folders or results.json files: mechdiff report RUN ...")
    plans = [plan for place in places if (plan := planned(place))]
    quick = any(bool(plan.get("quick")) for plan in plans)
    pairs = {name: Pair(name) for plan in plans for name in plan["pairs"]}
    contrasts = Results()
    for path in _tables(places):
        results = Results.read(path)
        if path.name == CONTRASTS:
            contrasts = Results([*contrasts, *results], results.provenance)
            continue
        name = path if beside is None else Path(os.path.relpath(path, beside))
        run = Run(path, results, name.as_posix())
        if not run.question:
            continue
        pair = pairs.setdefault(
            pair_name(results) or "unnamed pair", Pair(pair_name(results) or "unnamed pair")
        )
        if run.question in pair.runs:
            both = f"{pair.runs[run.question].path} and {path}"
            raise ConfigError(f"{both} both answer {run.question} of {pair.name}; give one of them")
        pair.runs[run.question] = run
    if not any(pair.runs for pair in pairs.values()):
        raise ConfigError(f"no record in {', '.join(map(str, places))}; give the results.json of a run")
    for pair in pairs.values():
        pair.runs = {q: pair.runs[q] for q in QUESTIONS if q in pair.runs}
    ordered = sorted(pairs.values(), key=lambda pair: pair.spec.get("domain") == "cognitive")
    return Study(ordered, contrasts, quick)


def planned(folder: str | Path) -> dict[str, Any] | None:
    """Return what a folder says of the study that it holds, None if it holds none.

    Raises:
        ConfigError: If that cannot be read.
    """
    file = Path(folder) / STUDY
    if not file.is_file():
        return None
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        plan = None
    if not (isinstance(plan, dict) and isinstance(plan.get("pairs"), dict)):
        raise ConfigError(
            f"{file} does not say of which study it is; restore it, or write elsewhere (key: --out)"
        )
    return plan


def _tables(places: Sequence[str | Path]) -> Iterator[Path]:
    for place in map(Path, places):
        if not place.is_dir():
            yield place
            continue
        found = sorted(path for name in (TABLE, CONTRASTS) for path in place.rglob(name))
        if not found:
            raise ConfigError(f"{place} holds no {TABLE}; give the folder of a run or of a study")
        yield from found
