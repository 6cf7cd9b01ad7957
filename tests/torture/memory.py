"""Measure whether memory grows with the number of texts: `python -m tests.torture.memory [--families N]`.

Each run is a fork that measures its own peaks. It extracts, fits, or sweeps, first on a number of texts and
then on ten times as many. A text may add what it says, its tokens and where its rows are, but not its
activations, which are several times what is allowed. A test of maps holds the rows that it tests, and may
grow by a few times these.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mechdiff.__main__ import main as verb
from mechdiff.parser import quiet
from tests.torture.phases import Phases, forget, highest
from tests.toys import prompts
from tests.workspace import SWEEP, called, config, run, save_model, save_prompts, small, write_pair

TIMES = 10
EACH = 40.0
"""KiB that a text may add; its activations are about 280."""
HELD = 5.0
"""Times the size of the activations that a test of maps adds by which it may grow."""
WIDE = {"layers": 2, "hidden_size": 512, "intermediate_size": 512}


def place(folder: Path, families: int) -> Path:
    """Make a pair with wide layers and many prompts of each split; return its pair file."""
    folder.mkdir()
    save_model(folder / "base", **WIDE)
    save_model(folder / "tuned", noise=0.02, **WIDE)
    save_prompts(folder)
    for split in ("fit", "dev", "eval"):
        found = [replace(p, id=f"{split}-{p.id}", split=split) for p in prompts(families)]
        lines = [json.dumps(asdict(prompt), ensure_ascii=False) for prompt in found]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return write_pair(folder)


def needs(work: Callable[[], int]) -> dict[str, float]:
    """Return what a fork of this process needed for a work, in MiB, by phase.

    Raises:
        RuntimeError: If the work fails.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            forget()
            code = work()
            found = {"peak": highest()}
            if Phases.fit:
                found = {"peak": Phases.fit, "test": found["peak"], "tested": Phases.tested}
            os.write(writing, json.dumps(found).encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as said:
        told = said.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or not told:
        raise RuntimeError("a run failed")
    return {str(phase): float(mib) for phase, mib in json.loads(told).items()}


def works(pair: Path, root: Path) -> dict[str, Callable[[], int]]:
    """Return what is measured, in order: the fits find the stores filled."""
    batches = "--data.batch_size=256"  # of which even few texts fill several
    common = [*small(pair, root), "--layers=[0,1]", batches]
    sgd = ["--trainer.max_epochs=2"]
    phases = called("tests.torture.phases.Phases")
    sweep = called("mechdiff.callbacks.Steering", **SWEEP)
    return {
        "extraction": lambda: verb(["extract", *config("clt_cultural"), *common, called()]),
        "map, closed form": lambda: run("fit", *config("clt_cultural"), *common, phases),
        "map, by descent": lambda: run("fit", *config("clt_cultural_sgd"), *common, *sgd, phases),
        "subspace": lambda: run("fit", *config("steering_cultural"), *common, phases),
        "sweep": lambda: run("fit", *config("steering_cultural"), *common, sweep),
    }


def measure(
    scratch: Path, families: int, names: Sequence[str] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Return what works need for some texts and for ten times as many, in MiB, by work and phase.

    Args:
        scratch: An empty folder.
        families: Families of prompts, 16 texts each.
        names: Some of `works`; None takes all.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for times in (1, TIMES):
        pair = place(scratch / str(times), families * times)
        texts = f"{16 * families * times} texts"
        for name, work in works(pair, pair.parent).items():
            if names is not None and name not in names:
                continue
            needed = needs(work)
            print(f"{texts}, {name}: {', '.join(f'{k} {v:.0f} MiB' for k, v in needed.items())}", flush=True)
            for phase, mib in needed.items():
                found.setdefault(name, {}).setdefault(phase, []).append(mib)
        stores = sum(path.stat().st_size for path in (pair.parent / "stores").rglob("*.h5")) / 2**20
        print(f"{texts}: stores of {stores:.0f} MiB", flush=True)
    return found


def grown(phases: dict[str, list[float]], texts: int) -> bool:
    """Tell whether a work needs more than is allowed.

    Args:
        phases: What it needed, in MiB, as `measure` returns it.
        texts: How many texts were added.

    >>> grown({"peak": [400.0, 439.0]}, 1024), grown({"peak": [400.0, 441.0]}, 1024)
    (False, True)
    >>> tested = {"peak": [400.0, 400.0], "tested": [10.0, 30.0]}
    >>> grown(tested | {"test": [400.0, 509.0]}, 256), grown(tested | {"test": [400.0, 511.0]}, 256)
    (False, True)
    """
    added = {phase: most - few for phase, (few, most) in phases.items()}
    texts_need = EACH * texts / 1024
    if added["peak"] > texts_need:
        return True
    return "test" in added and added["test"] > texts_need + HELD * added["tested"]


def main() -> int:
    parser = argparse.ArgumentParser("tests.torture.memory", description=__doc__)
    parser.add_argument("--families", type=int, default=16, help="families of prompts, 16 texts each")
    parser.add_argument("--out", type=Path, help="file that receives the numbers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    with tempfile.TemporaryDirectory(prefix="mechdiff-memory-") as scratch:
        found = measure(Path(scratch), given.families)
    texts = 16 * given.families * (TIMES - 1)
    for name, phases in found.items():
        for phase, (few, most) in phases.items():
            each = f"{(most - few) * 1024 / texts:.1f} KiB for each text"
            print(f"{name}, {phase}: {most - few:+.0f} MiB ({most / few - 1:+.1%}), {each}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(grown(phases, texts) for phases in found.values()))


if __name__ == "__main__":
    sys.exit(main())
