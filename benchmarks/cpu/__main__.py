"""Measure the library on a CPU beside what is used: `python -m benchmarks.cpu [--tiny] [--parts ...]`.

Ways of one thing are run in turn, in one process and on the same inputs, and each row says how far their
results agree. Other tools run in an environment of their own (`benchmarks.peer`); one that is not there is
listed as not measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.cpu.analysis import analysis
from benchmarks.cpu.bench import CPU, FULL, TINY, Bench
from benchmarks.cpu.choices import choices
from benchmarks.cpu.extraction import extraction, memory, pair
from benchmarks.cpu.heads import gradients, heads
from benchmarks.cpu.reading import reading
from benchmarks.cpu.startup import startup
from benchmarks.cpu.sweeps import sweeps
from benchmarks.plot import draw_goals
from benchmarks.shapes import ROOT
from mechdiff.parser import quiet

PAIR = ROOT / "configs" / "pairs" / "cognitive_smol.yaml"
PEERS = ROOT / ".venv-bench" / "bin" / "python"
PARTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": Bench.ceilings,
    "extraction": extraction,
    "pair": pair,
    "analysis": analysis,
    "reading": reading,
    "sweeps": sweeps,
    "heads": heads,
    "gradients": gradients,
    "choices": choices,
    "startup": startup,
    "memory": memory,
}
"""`analysis` and `reading` need the stores of `pair`."""


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the parts that are asked for and return what they measured."""
    parser = argparse.ArgumentParser("python -m benchmarks.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", type=Path, default=PAIR, help="file of the pair")
    parser.add_argument("--out", type=Path, help="folder for results; by default they are committed here")
    parser.add_argument("--peers", type=Path, default=PEERS, help="interpreter with the other tools")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a fraction of everything, to see that it runs")
    given = parser.parse_args(args)
    quiet()
    torch.set_grad_enabled(True)
    work = Path(tempfile.mkdtemp(prefix="mechdiff-bench-", dir=given.out))
    kept = given.out or work / "out"
    kept.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.pair.absolute(), kept, work, given.peers, TINY if given.tiny else FULL)
    try:
        bench.say(f"{results.hardware()}, pair {given.pair.stem}, {CPU}")
        failed = results.run_parts({name: partial(PARTS[name], bench) for name in given.parts}, bench.say)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(results.targets(bench.lines))
    if given.out is None and not given.tiny:
        results.append(bench.lines)
        results.draw()
        draw_goals(results.read(), results.HERE / "goals.svg")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return bench.lines


if __name__ == "__main__":
    main(sys.argv[1:])
