"""What a study consists of: one run per pair and question in fixed folders.

1. ``<out>/<pair>/<question>/`` holds a run as train.py or evaluate.py leave it, and a marker once it is done
   that knows its table.
2. ``<out>/study.json`` says which study a folder holds; another one is refused.
3. A question that was cut off begins anew, from an empty folder; what is done is not run again. Layers that
   RQ1 proposes are handed to the questions after it, which are run again where it proposes others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mechdiff import prepare
from mechdiff.errors import ConfigError
from mechdiff.files import PART, write_text
from mechdiff.pairs.spec import PairSpec
from mechdiff.parser import OneLineParser
from mechdiff.reporting.report.runs import STUDY, TABLE, planned
from mechdiff.results import Results, handed_on

RUNS = {"rq1": ("test", "rq1"), "rq2": ("fit", "clt"), "rq3": ("fit", "steering"), "rq4": ("test", "rq4")}
"""Verb of a question and the beginning of its configuration's name."""
MINUTES = {"rq1": 9.0, "rq2": 2.5, "rq3": 18.0, "rq4": 7.0}
"""Expected on two cores for the embedded pairs; only the remaining time shown rests on it."""
HASTE = 0.17
"""What a quick study takes of that."""
QUICK = "quick"
"""Folder of configurations that replace numbers of prompts and sweeps by smaller ones."""
MARKER = "done.json"
TAKES_LAYERS = ("rq2", "rq3")


@dataclass(frozen=True)
class Step:
    """One question of one pair.

    Attributes:
        pair: The pair file.
        name: Name of the pair.
        question: ``rq1`` and so on.
        configs: Configurations, the later ones over the earlier.
        out: Folder of the study.
    """

    pair: Path
    name: str
    question: str
    configs: tuple[Path, ...]
    out: Path

    @property
    def expected(self) -> float:
        """How long it should take, in seconds; a configuration over another one makes it quick."""
        return 60 * MINUTES[self.question] * (HASTE if len(self.configs) > 1 else 1.0)

    @property
    def folder(self) -> Path:
        """Where its run goes."""
        return self.out / self.name / self.question

    @property
    def log(self) -> Path:
        """What its run prints; beside the folder, which a run that is refused takes away."""
        return self.out / self.name / f"{self.question}.log"

    @property
    def ended(self) -> bool:
        """Whether it has run to the end and its table is the one it left, whatever RQ1 proposes by now."""
        table = self.folder / TABLE
        return table.is_file() and self._marker.get("results") == _digest(table)

    @property
    def done(self) -> bool:
        """Whether it has run to the end, with the layers that RQ1 proposes."""
        return self.ended and (not self.takes_layers or self._marker.get("layers", "") == self.layers)

    @property
    def seconds(self) -> float:
        """How long it took, 0 if it is not done."""
        return float(self._marker["seconds"]) if self.ended else 0.0

    @property
    def takes_layers(self) -> bool:
        """Whether it is run at the layers that RQ1 of the pair proposes."""
        text = self.configs[0].read_text(encoding="utf-8")
        marked = re.search(r"^layers: *from_rq1\b", text, re.M) is not None
        return self.question != "rq1" and (self.question in TAKES_LAYERS or marked)

    @property
    def layers(self) -> list[str] | None:
        """The sites that RQ1 of the pair proposes, None as long as it has not."""
        table = self._scan
        if not (table.is_file() and _read(table.with_name(MARKER)).get("results") == _digest(table)):
            return None
        return list(_proposed(table, table.stat().st_mtime_ns)) or None

    @property
    def _scan(self) -> Path:
        return self.out / self.name / "rq1" / TABLE

    @property
    def _marker(self) -> dict[str, Any]:
        return _read(self.folder / MARKER)

    def begin(self) -> None:
        """Make an empty folder: nothing of an earlier attempt is mixed in."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)

    def end(self, seconds: float) -> None:
        """Mark it as done."""
        body: dict[str, Any] = {"seconds": round(seconds, 1), "results": _digest(self.folder / TABLE)}
        body |= {"layers": self.layers} if self.takes_layers else {}
        write_text(self.folder / MARKER, json.dumps(body, indent=1) + "\n")

    def arguments(self, more: Sequence[str] = ()) -> list[str]:
        """Return the command line of its run.

        Args:
            more: Options of the user, which come last.
        """
        found = [part for path in self.configs for part in ("--config", str(path))]
        found += ["--pair", str(self.pair), "--trainer.enable_progress_bar=false"]
        logger = {"save_dir": self.out, "name": self.name, "version": self.question}
        found += [f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()]
        if self.takes_layers and self.layers:
            found.append(f"--layers={self._scan}")
        return [*found, *more]


def read_pair(path: Path, typed: Sequence[str] = ()) -> PairSpec:
    """Read a pair file as a run would.

    Args:
        path: The file.
        typed: Options of the command line after it.

    Raises:
        PairError: If it is not valid.
        SystemExit: If it is not a pair file; the reason is printed in one line.
    """
    parser = OneLineParser()
    parser.add_argument("--pair", type=PairSpec)
    OneLineParser.typed = ["--pair", str(path)]
    return prepare.pair_spec(parser.parse_args(["--pair", str(path)]).pair, typed)


def plan(
    pairs: Sequence[Path],
    questions: Sequence[str],
    out: Path,
    configs: Path,
    quick: bool,
    more: Sequence[str] = (),
) -> tuple[list[Step], list[str]]:
    """Return what is to be run, in order, and what cannot be because it has no configuration.

    Args:
        pairs: Pair files.
        questions: The questions, such as ``rq1``.
        out: Folder of the study.
        configs: Folder of the configurations.
        quick: Put the smaller numbers of `QUICK` over them.
        more: Options of the user.

    Raises:
        ConfigError: If two pairs have the same name.
    """
    steps: list[Step] = []
    without: list[str] = []
    for path in pairs:
        spec = read_pair(path, more)
        if any(step.name == spec.name for step in steps):
            raise ConfigError(
                f"two pairs have the name {spec.name}; allowed: names that differ (key: pair.name)"
            )
        for question in questions:
            name = f"{RUNS[question][1]}_{spec.domain}.yaml"
            files = [configs / name, *([configs / QUICK / f"{RUNS[question][1]}.yaml"] if quick else [])]
            if not files[0].is_file():
                without.append(f"{question} of {spec.name}: no {files[0]}")
                continue
            found = tuple(f.resolve() for f in files if f.is_file())
            steps.append(Step(path.resolve(), spec.name, question, found, out.resolve()))
    return steps, without


def claim(out: Path, pairs: Sequence[Path], quick: bool, more: Sequence[str]) -> None:
    """Make the folder of a study, or check that it holds this one.

    Args:
        out: The folder.
        pairs: Pair files.
        quick: Whether the study is a quick one.
        more: Options passed on to every run.

    Raises:
        ConfigError: If it holds another study, or something else.
    """
    specs = [read_pair(path, more) for path in pairs]
    digests = {
        s.name: hashlib.sha256(json.dumps(asdict(s), sort_keys=True).encode()).hexdigest() for s in specs
    }
    wanted = {"pairs": digests, "quick": quick, "options": list(more)}
    file, held = out / STUDY, planned(out)
    if held is not None:
        changed = [key for key in wanted if held.get(key) != wanted[key]]
        if changed:
            names, kind = ", ".join(held.get("pairs", {})), ", quick" if held.get("quick") else ""
            what = " and ".join("pair files" if key == "pairs" else key for key in changed)
            raise ConfigError(
                f"{out} holds another study (of {names}{kind}): {what} differ; "
                "resume it with the same, or write elsewhere (key: --out)"
            )
        return
    if out.is_dir() and any(path.suffix != PART for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no study; give another folder (key: --out)")
    out.mkdir(parents=True, exist_ok=True)
    for part in out.iterdir():  # left by one that was killed before anything was run
        part.unlink()
    write_text(file, json.dumps(wanted, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any]:
    """Read a marker; empty where there is none, or it is none."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _digest(table: Path) -> str:
    return hashlib.sha256(table.read_bytes()).hexdigest()


@cache
def _proposed(table: Path, written: int) -> tuple[str, ...]:
    """Return the sites that a scan proposes; `written`, when it was, tells one table from the next."""
    return tuple(str(r.site) for r in handed_on(Results.read(table)))
