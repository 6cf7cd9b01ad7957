"""Fill the disk at random moments of a fit with its extraction: `python -m tests.torture.disk [--trials N]`.

The disk is a small one in memory, which root may mount. A run has to end with exit code 2 and one line,
nothing half written, and the same command has to give what it gives on an empty disk.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from mechdiff.parser import quiet
from tests.torture.harness import PATIENCE, Processes
from tests.torture.works import _bad_runs, _fit, _fitted
from tests.workspace import workspace

SIZE = 8 * 2**20
"""Bytes of the disk."""


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """Mount a small disk."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Fill a disk to the last byte."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return


def trial(pair: Path, folder: Path, moment: float, wanted: object) -> tuple[str, float]:
    """Fill a disk after some seconds of a run.

    Returns:
        What went wrong, or else how the run ended; and how long it took, if it was over by then.
    """
    log = folder.with_suffix(".txt")
    with disk(folder):
        run = folder / "run"
        run.mkdir()
        start = time.monotonic()
        processes = Processes(partial(_fit, pair), run, 1, log)
        took = time.monotonic() - start if processes.wait(moment) else math.inf
        fill(folder / "filler")
        if not processes.wait(PATIENCE):
            processes.kill(processes.running())
            return "hangs", took
        (code,) = processes.codes.values()
        said = log.read_text()
        (folder / "filler").unlink()
        lines = [line for line in said.splitlines() if line.startswith("mechdiff: ")]
        if code not in (0, 2) or (code == 2 and len(lines) != 1) or "Traceback" in said:
            return f"exit code {code}: {said[-3000:]}", took
        if bad := _bad_runs(run):
            return f"half written: {bad}", took
        again = Processes(partial(_fit, pair), run, 1, log)
        if not again.wait(PATIENCE) or any(again.codes.values()) or _fitted(run) != wanted:
            return f"differs afterwards: {log.read_text()[-2000:]}", took
    return "refused" if code else "finished", took


def main() -> int:
    parser = argparse.ArgumentParser("tests.torture.disk", description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the moments")
    parser.add_argument("--out", type=Path, help="file that receives the counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    draws = random.Random(given.seed)
    ends: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="mechdiff-disk-") as scratch:
        pair = workspace(Path(scratch) / "user")
        whole = Path(scratch) / "whole"
        whole.mkdir()
        start = time.monotonic()
        processes = Processes(partial(_fit, pair), whole, 1, Path(scratch) / "whole.txt")
        assert processes.wait(PATIENCE)
        length, wanted = time.monotonic() - start, _fitted(whole)
        for number in range(given.trials):
            end, took = trial(pair, Path(scratch) / str(number), draws.uniform(0, length), wanted)
            length = min(length, took)  # the machine may have less to do by now
            kind = end if end in ("refused", "finished") else "failed"
            ends[kind] = ends.get(kind, 0) + 1
            print(end, flush=True)
            if given.out:
                given.out.write_text(json.dumps({"seed": given.seed, **ends}, indent=1) + "\n")
    print(ends)
    return int("failed" in ends)


if __name__ == "__main__":
    sys.exit(main())
