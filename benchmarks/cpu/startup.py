"""How long `train.py --help` takes beside importing Lightning."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from benchmarks.cpu.bench import Bench
from benchmarks.shapes import ROOT
from benchmarks.turns import Turn, in_turn, median, ratio

COMMANDS = {"help": ["train.py", "--help"], "lightning": ["-c", "import lightning"]}


def startup(bench: Bench) -> None:
    """Measure both in processes of their own."""
    for command in COMMANDS.values():  # bytecode and files in memory
        _run(command)
    ways = {name: lambda command=command: _run(command) for name, command in COMMANDS.items()}
    found = in_turn(ways, bench.size.starts)
    said = subprocess.run(
        [sys.executable, *COMMANDS["help"]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--pair" in said.stdout, "the help says nothing of pairs"
    figures = {f"{name}_seconds": median(turns) for name, turns in found.items()}
    figures |= {"lines_of_help": len(said.stdout.splitlines())}
    bench.keep(
        "train.py --help",
        figures,
        "what is not Lightning is transformers, the configured classes, and the parser of their options",
        over_import_lightning=ratio(found["help"], found["lightning"], 1.5, at_most=True),
    )


def _run(command: list[str]) -> Turn:
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Turn(time.perf_counter() - begun, used)
