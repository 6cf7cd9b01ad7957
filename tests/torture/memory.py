"""Measure whether memory grows with the number of texts: `python -m tests.torture.memory [--families N]`.

Each run is a fork that measures its own peak. It extracts, or fits, first a number of texts and then ten
times as many; their activations, kept in memory, would exceed the growth that is allowed several times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from mechdiff.__main__ import main as verb
from mechdiff.parser import quiet
from tests.toys import prompts
from tests.workspace import config, run, save_model, save_prompts, small, write_pair

TIMES = 10
GROWTH = 0.05
"""Largest growth of the peak that is allowed, as a share."""
WIDE = {"layers": 2, "hidden_size": 512, "intermediate_size": 512}
NONE = "--trainer.callbacks=[]"


def place(folder: Path, families: int) -> Path:
    """Make a pair with wide layers and many fit prompts, few others; return its pair file."""
    folder.mkdir()
    save_model(folder / "base", **WIDE)
    save_model(folder / "tuned", noise=0.02, **WIDE)
    save_prompts(folder)
    lines = [json.dumps(asdict(prompt), ensure_ascii=False) for prompt in prompts(families)]
    (folder / "fit.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return write_pair(folder)


def peak(work: Callable[[], int]) -> float:
    """Return the most memory that a fork of this process needed for a work, in MiB.

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
            Path("/proc/self/clear_refs").write_text("5")  # what this process needed so far does not count
            code = work()
            lines = Path("/proc/self/status").read_text().splitlines()
            os.write(writing, next(line for line in lines if line.startswith("VmHWM")).split()[1].encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as said:
        kib = said.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or not kib:
        raise RuntimeError("a run failed")
    return int(kib) / 1024


def works(pair: Path, root: Path) -> dict[str, Callable[[], int]]:
    """Return what is measured, in order: the fits find the stores filled."""
    batches = "--data.batch_size=256"  # of which even few texts fill several
    common = [*small(pair, root), "--layers=[0,1]", batches, NONE]
    sgd = ["--trainer.max_epochs=2"]
    return {
        "extraction": lambda: verb(["extract", *config("clt_cultural"), *common]),
        "map, closed form": lambda: run("fit", *config("clt_cultural"), *common),
        "map, by descent": lambda: run("fit", *config("clt_cultural_sgd"), *common, *sgd),
        "subspace": lambda: run("fit", *config("steering_cultural"), *common),
    }


def main() -> int:
    parser = argparse.ArgumentParser("tests.torture.memory", description=__doc__)
    parser.add_argument("--families", type=int, default=4, help="families of prompts, 16 texts each")
    parser.add_argument("--out", type=Path, help="file that receives the numbers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="mechdiff-memory-") as scratch:
        for times in (1, TIMES):
            pair = place(Path(scratch) / str(times), given.families * times)
            for name, work in works(pair, pair.parent).items():
                peaks.setdefault(name, []).append(peak(work))
                print(f"{16 * given.families * times} texts, {name}: {peaks[name][-1]:.0f} MiB", flush=True)
            stores = sum(path.stat().st_size for path in (pair.parent / "stores").rglob("*.h5")) / 2**20
            print(f"{16 * given.families * times} texts: stores of {stores:.0f} MiB", flush=True)
    grown = {name: most / few - 1 for name, (few, most) in peaks.items()}
    for name, share in grown.items():
        print(f"{name}: {share:+.1%}")
    if given.out:
        given.out.write_text(json.dumps({"peaks": peaks, "growth": grown}, indent=1) + "\n")
    return int(max(grown.values()) > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
