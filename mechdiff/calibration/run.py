"""Run the cases of a calibration, one line of raw results each, over any number of processes.

1. A case that has its line is not run again, whoever wrote it; a line is written whole, under a lock.
2. Of several processes each takes the next case that nobody is at, since cases differ in length by an order
   of magnitude; whoever finishes the last one finds all lines there. A case is held by a lock of its file,
   which the system drops with the process: what a killed one was at is run by the next call.
3. The base is loaded once per process; a sibling shares every tensor with it that was not edited.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mechdiff.calibration.cases import Case
from mechdiff.calibration.measure import (
    ask_heads,
    ask_layers,
    ask_map,
    ask_nothing,
    ask_rank,
    parts,
    quiet,
)
from mechdiff.calibration.planting import case_prompts, plant
from mechdiff.calibration.states import CaseStates
from mechdiff.errors import ConfigError
from mechdiff.interventions.sites import Site
from mechdiff.pairs.loading import LoadedModel, load_model
from mechdiff.pairs.organisms import planted_pair
from mechdiff.pairs.spec import ModelId, ModelSpec
from mechdiff.provenance import software

RAW = "cases.jsonl"
HELD = ".held"

Line = dict[str, Any]


def load_base(identity: str, device: str) -> LoadedModel:
    """Load the model that is planted in, in single precision.

    Args:
        identity: Hub id, folder, or a GGUF in a wheel.
        device: Where it goes.

    Raises:
        PairError: If it cannot be had.
    """
    return load_model(ModelSpec(id=ModelId(identity)), device=device)


def measure(base: LoadedModel, case: Case, seed: int) -> Line:
    """Plant a case, ask its questions, and return what is to be kept.

    Args:
        base: The model that is planted in, left as it is.
        case: The case.
        seed: Of the calibration.
    """
    began = time.process_time(), time.perf_counter()
    prompts = case_prompts(case, seed)
    sibling, truth = plant(base, case, prompts, seed)
    pair = planted_pair(base, sibling, case.kind)
    found: dict[str, Any] = {}
    if case.kind in ("swapped", "halves"):
        found["rq4"] = ask_nothing(pair, prompts, case.kind, seed + case.draw)
    else:
        site = Site(truth.layers[0] if truth.layers else base.depth // 2)
        if case.questions != ("rq4",):
            fitted = [p for p in prompts if p.split == "fit"]
            states = CaseStates(pair, fitted, [Site(layer) for layer in range(base.depth)])
        if "rq1" in case.questions:
            found["rq1"] = ask_layers(pair, prompts, states, seed)
            entered = found["rq1"]["patch"]["into_tuned"]["onset"]
            site = site if entered is None else Site(entered)  # where a study goes on
        if "rq2" in case.questions:
            found["rq2"] = ask_map(pair, prompts, states, site, seed)
        if "rq3" in case.questions:
            found["rq3"] = ask_rank(pair, prompts, states, site, truth, seed)
        if "rq4" in case.questions:
            found["rq4"] = ask_heads(pair, prompts, seed)
    known: dict[str, Any] = {
        "layers": truth.layers,
        "rank": truth.rank,
        "heads": truth.heads,
        "components": truth.components,
    }
    if len(truth.layers) > 1 and not case.null:
        targets = [p for p in prompts if p.split == "eval" and p.label == "target"]
        known["parts"] = parts(pair, targets, truth.layers)
    spent = {"cpu_seconds": time.process_time() - began[0], "seconds": time.perf_counter() - began[1]}
    where = {"device": base.device.type, "seed": seed, "base": base.fingerprint, "software": software()}
    return {
        **case.entry(),
        "truth": known,
        "found": found,
        **where,
        **{name: round(x, 2) for name, x in spent.items()},
    }


def run_cases(
    load: Callable[[], LoadedModel],
    cases: Sequence[Case],
    folder: Path,
    seed: int,
    rank: int = 0,
    say: Callable[[str], None] = print,
) -> bool:
    """Run what is not done yet and no other process is at.

    Args:
        load: Returns the base; called if there is anything to run.
        cases: All cases of the calibration.
        folder: Where the lines go.
        seed: Of the calibration.
        rank: Number of this process, for what it says.
        say: Reports progress.

    Returns:
        Whether all cases are done, by whomever.

    Raises:
        ConfigError: If the folder holds cases of another seed or base.
    """
    quiet()
    folder.mkdir(parents=True, exist_ok=True)
    base: LoadedModel | None = None
    for number, case in enumerate(cases, 1):
        with _held(folder, case) as mine:
            if not mine or case in finished(folder, seed):
                continue
            base = base or load()
            _check_base(folder, base)
            line = measure(base, case, seed)
            _write(folder, line)
        took = f"{line['seconds']:.0f} s, {line['cpu_seconds']:.0f} s of CPU"
        say(f"[{rank}] {number}/{len(cases)} {case}: {took}")
    return set(cases) <= set(finished(folder, seed))


def read_lines(folder: Path) -> list[Line]:
    """Read the raw results of a folder; none if there are none."""
    path = folder / RAW
    if not path.is_file():
        return []
    with _lock(folder):
        text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def finished(folder: Path, seed: int) -> list[Case]:
    """List the cases that have their line.

    Raises:
        ConfigError: If a line is of another seed.
    """
    lines = read_lines(folder)
    if others := {line["seed"] for line in lines} - {seed}:
        allowed = f"allowed: {min(others)}, or another folder (key: --seed)"
        raise ConfigError(f"{folder} holds cases of another seed than {seed}; {allowed}")
    return [case_of(line) for line in lines]


def case_of(line: Line) -> Case:
    """Return the case of a line."""
    return Case(line["kind"], line["strength"], line["prompts"], line["draw"])


def _check_base(folder: Path, base: LoadedModel) -> None:
    if others := {line["base"] for line in read_lines(folder)} - {base.fingerprint}:
        raise ConfigError(f"{folder} holds cases of another base, {min(others)}; give a folder (key: --out)")


def _write(folder: Path, line: Line) -> None:
    with _lock(folder), (folder / RAW).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


@contextmanager
def _held(folder: Path, case: Case) -> Iterator[bool]:
    """Hold a case, and say whether it is this process that does."""
    held = folder / HELD
    held.mkdir(exist_ok=True)
    lock = FileLock(held / f"{case.kind}-{case.strength:g}-{case.prompts}-{case.draw}", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / ".lock")
