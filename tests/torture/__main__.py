"""Kill extraction, fits, studies and reports at random moments: `python -m tests.torture [--kills N ...]`.

It prints a table and writes the counts as JSON; the exit code is 1 if anything was unreadable, lost, doubled,
different from an uninterrupted run, or could not be finished.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from mechdiff.parser import quiet
from tests.torture.harness import PATIENCE, Count, torture
from tests.torture.works import works

KILLS = [60, 60, 30, 25, 25]
"""Kills of extraction, extraction by two processes, fit, study and report."""


def main() -> int:
    parser = argparse.ArgumentParser("tests.torture", description=__doc__)
    parser.add_argument("--kills", nargs=len(KILLS), type=int, default=KILLS, metavar="N")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the moments")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds after which a run counts as hung"
    )
    parser.add_argument("--out", type=Path, help="file that receives the counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    print(f"seed {given.seed}", flush=True)
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory(prefix="mechdiff-torture-") as scratch:
        for work, kills in zip(works(Path(scratch) / "user"), given.kills, strict=True):
            if not kills:
                continue
            place = Path(scratch) / work.name.replace(", ", "-").replace(" ", "-")
            place.mkdir()

            def tell(count: Count, name: str = work.name) -> None:
                counts[name] = count
                if given.out:
                    body = {"seed": given.seed, **{name: asdict(c) for name, c in counts.items()}}
                    given.out.write_text(json.dumps(body, indent=1) + "\n")

            found = counts[work.name] = torture(work, place, kills, given.seed, tell, given.patience)
            print(
                f"{work.name}: {found.kills} kills, {found.finished} runs finished after them in "
                f"{found.seconds:.0f} s; unreadable {len(found.unreadable)}, lost {len(found.lost)}, doubled "
                f"{found.duplicates}, different {found.different}, failed {len(found.failed)}",
                flush=True,
            )
            for line in [*found.unreadable, *found.lost, *found.failed]:
                print(f"  {line}", flush=True)
    return int(not all(count.sound for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
