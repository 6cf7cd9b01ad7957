"""What a study consists of: one run per pair and question in fixed folders, and numbers that compare pairs.

1. ``<out>/<pair>/<question>/`` holds a run as train.py or evaluate.py leave it, and a marker once it is done.
2. ``<out>/study.json`` says which study a folder holds; another one is refused.
3. A question that was cut off begins anew, from an empty folder; what is done is not run again. Layers that
   RQ1 proposes are handed to the questions after it, which are run again where it proposes others.
4. ``<out>/contrasts.json`` compares pairs, in the form of records.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from mechdiff import prepare
from mechdiff.config import SEED
from mechdiff.errors import ConfigError
from mechdiff.functional.churn import churn_contrast, paired
from mechdiff.functional.contrast import independent_difference
from mechdiff.functional.stats import Interval, generator
from mechdiff.pairs.spec import PairSpec
from mechdiff.parser import OneLineParser
from mechdiff.reporting.report import handle, heads, maps, where
from mechdiff.reporting.report.content import Citations
from mechdiff.reporting.report.runs import CONTRASTS, STUDY, TABLE, Study
from mechdiff.reporting.report.view import View
from mechdiff.results import Record, Results, handed_on

RUNS = {"rq1": ("test", "rq1"), "rq2": ("fit", "clt"), "rq3": ("fit", "steering"), "rq4": ("test", "rq4")}
"""Verb of a question and the beginning of its configuration's name."""
MINUTES = {"rq1": 10.0, "rq2": 5.0, "rq3": 15.0, "rq4": 10.0}
"""Expected on two cores for the embedded pairs; only the remaining time shown rests on it."""
QUICK = "quick"
"""Folder of configurations that replace numbers of prompts and sweeps by smaller ones."""
MARKER = "done.json"
ITEMS = "items.parquet"
ROLES = ("base", "tuned")
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
    def folder(self) -> Path:
        """Where its run goes."""
        return self.out / self.name / self.question

    @property
    def log(self) -> Path:
        """What its run prints; beside the folder, which a run that is refused takes away."""
        return self.out / self.name / f"{self.question}.log"

    @property
    def ended(self) -> bool:
        """Whether it has run to the end, whatever RQ1 proposes by now."""
        return (self.folder / MARKER).is_file() and (self.folder / TABLE).is_file()

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
        if not (table.is_file() and table.with_name(MARKER).is_file()):
            return None
        return list(_proposed(table, table.stat().st_mtime_ns)) or None

    @property
    def _scan(self) -> Path:
        return self.out / self.name / "rq1" / TABLE

    @property
    def _marker(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / MARKER).read_text(encoding="utf-8")))

    def begin(self) -> None:
        """Make an empty folder: nothing of an earlier attempt is mixed in."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def end(self, seconds: float) -> None:
        """Mark it as done."""
        digest = hashlib.sha256((self.folder / TABLE).read_bytes()).hexdigest()
        body: dict[str, Any] = {"seconds": round(seconds, 1), "results": digest}
        body |= {"layers": self.layers} if self.takes_layers else {}
        (self.folder / MARKER).write_text(json.dumps(body) + "\n")

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


def read_pair(path: Path) -> PairSpec:
    """Read a pair file as a run would.

    Raises:
        PairError: If it is not valid.
        SystemExit: If it is not a pair file; the reason is printed in one line.
    """
    parser = OneLineParser()
    parser.add_argument("--pair", type=PairSpec)
    OneLineParser.typed = ["--pair", str(path)]
    return prepare.pair_spec(parser.parse_args(["--pair", str(path)]).pair)


def plan(
    pairs: Sequence[Path], questions: Sequence[str], out: Path, configs: Path, quick: bool
) -> tuple[list[Step], list[str]]:
    """Return what is to be run, in order, and what cannot be because it has no configuration.

    Args:
        pairs: Pair files.
        questions: The questions, such as ``rq1``.
        out: Folder of the study.
        configs: Folder of the configurations.
        quick: Put the smaller numbers of `QUICK` over them.

    Raises:
        ConfigError: If two pairs have the same name.
    """
    steps: list[Step] = []
    without: list[str] = []
    for path in pairs:
        spec = read_pair(path)
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
    specs = [read_pair(path) for path in pairs]
    digests = {
        s.name: hashlib.sha256(json.dumps(asdict(s), sort_keys=True).encode()).hexdigest() for s in specs
    }
    wanted = {"pairs": digests, "quick": quick, "options": list(more)}
    file = out / STUDY
    if file.is_file():
        held = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in wanted if held.get(key) != wanted[key]]
        if changed:
            names, kind = ", ".join(held.get("pairs", {})), ", quick" if held.get("quick") else ""
            what = " and ".join("pair files" if key == "pairs" else key for key in changed)
            raise ConfigError(
                f"{out} holds another study (of {names}{kind}): {what} differ; "
                "resume it with the same, or write elsewhere (key: --out)"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no study; give another folder (key: --out)")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def compare(study: Study) -> Path | None:
    """Write the numbers that compare every two pairs; None if there is nothing to compare.

    Args:
        study: The pairs, as read from the folder.
    """
    views = [View(pair, Citations()) for pair in study.pairs]
    found = [r for one, other in combinations(views, 2) for r in _differences(one, other)]
    if not found:
        return None
    folder = next(iter(study.pairs[0].runs.values())).path.parents[2]
    return Results(found, {"file": CONTRASTS}).write(folder / CONTRASTS)


def _differences(one: View, other: View) -> Iterator[Record]:
    """Yield other − one of the numbers that the report speaks of."""
    for quantity, pick in SPOKEN_OF.items():
        first, second = pick(one), pick(other)
        ends = [_interval(r) for r in (first, second)]
        if first is not None and ends[0] is not None and ends[1] is not None:
            yield _difference(quantity, first, independent_difference(ends[0], ends[1]), one, other)
    shares = [heads.churn(view)[0] for view in (one, other)]
    tables = [_changes(view) for view in (one, other)]
    if shares[0] is None or shares[1] is None or tables[0] is None or tables[1] is None:
        return
    floors = (float(shares[0].params["floor"]), float(shares[1].params["floor"]))
    draws = generator(SEED, "churn_difference", one.name, other.name)
    found = churn_contrast(tables[0], tables[1], floors, generator=draws)
    yield _difference("churn_difference", shares[0], found, one, other)


def _difference(quantity: str, first: Record, found: Interval, one: View, other: View) -> Record:
    about: dict[str, Any] = {"pairs": [one.name, other.name], "contrast": f"{other.name} − {one.name}"}
    about |= {k: first.params[k] for k in ("rule", "floor_from", "edit", "direction") if k in first.params}
    return Record(
        first.question,
        quantity,
        found.value,
        found.n,
        first.unit,
        found.low,
        found.high,
        split=first.split,
        positions=first.positions,
        params=about,
        flags=("one_sibling_per_class",),
    )


def _changes(view: View) -> Tensor | None:
    """Read tuned − base of every head from a run's values per prompt, ``(prompts, heads)``, if it has any.

    The heads stand in the order of their names; those that both models do not share are left out.
    """
    file = view.pair.runs["rq4"].path.with_name(ITEMS) if view.has("rq4") else None
    if file is None or not file.is_file():
        return None
    main = heads.family(view)
    measured = f"{main.get('metric')}/{main.get('baseline')}/"
    rows = pq.read_table(file, filters=[("quantity", "=", "head_attribution")]).to_pylist()
    values = {
        (r["direction"], r["prompt"], r["arm"].removeprefix(measured)): r["value"]
        for r in rows
        if r["arm"].startswith(measured)
    }
    prompts, names = (sorted({key[i] for key in values}) for i in (1, 2))
    names = [h for h in names if all((role, p, h) in values for role in ROLES for p in prompts)]
    if not prompts or not names:
        return None
    base, tuned = (torch.tensor([[values[role, p, h] for h in names] for p in prompts]) for role in ROLES)
    return paired(base, tuned)


def _recovery(view: View) -> Record | None:
    found = [where.recovery(view, r.site) for r in where.proposed(view)]
    return max((r for r in found if r and r.value is not None), key=lambda r: r.value or 0, default=None)


def _explained(view: View) -> Record | None:
    site = maps.site_of(view) if view.has("rq2") else None
    return None if site is None else maps.cell(view, "r2_delta", site)


def _interval(r: Record | None) -> Interval | None:
    if r is None or r.value is None or r.low is None or r.high is None:
        return None
    return Interval(r.value, r.low, r.high, r.n)


SPOKEN_OF: dict[str, Callable[[View], Record | None]] = {
    "patch_recovery": _recovery,
    "r2_delta": _explained,
    "interchange_recovery": lambda view: handle.best(view)[0] if view.has("rq3") else None,
}
"""What is compared, and how a pair's number is found: the one that its report speaks of."""


@cache
def _proposed(table: Path, written: int) -> tuple[str, ...]:
    """Return the sites that a scan proposes; `written`, when it was, tells one table from the next."""
    return tuple(str(r.site) for r in handed_on(Results.read(table)))
