"""Count how often intervals hold the truth, add it to a calibration and write its page.

``python -m mechdiff.calibration FOLDER`` reads ``FOLDER/pool.csv``; where there is none it runs the pair once
over some 2,200 prompts and keeps what it measures there. Cells of other questions stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mechdiff.commands.options import Options
from mechdiff.errors import in_one_line

PROMPTS = "pool.csv"


def parser() -> Options:
    """Build the parser."""
    found = Options("python -m mechdiff.calibration", description=__doc__)
    found.add_argument("folder", type=Path, metavar="FOLDER", help="holds calibration.json, if there is one")
    pair_help = "pair file of the pool; default: the embedded cultural pair"
    default = Path("configs/pairs/cultural_smol.yaml")
    found.add_argument("--pair", type=Path, default=default, metavar="FILE", help=pair_help)
    found.add_argument("--device", default="cpu", help="where the pair runs; default: cpu")
    found.add_argument("--trials", type=int, default=1000, metavar="N", help="samples of each size")
    found.add_argument("--seed", type=int, default=2027, help="of the samples; default: 2027")
    return found


@in_one_line
def main(args: Sequence[str]) -> int:
    """Count coverage; a user's mistake is one line and exit code 2.

    Args:
        args: Command line.
    """
    given = parser().parse_args(args)
    from mechdiff.calibration.cells import FILE, Calibration, read_calibration, write_calibration
    from mechdiff.calibration.coverage import coverage
    from mechdiff.calibration.pool import Pool, pool_of
    from mechdiff.calibration.report import INTERVALS, POOL, write
    from mechdiff.pairs.loading import load_pair
    from mechdiff.study import read_pair

    given.folder.mkdir(parents=True, exist_ok=True)
    held = (given.folder / FILE).is_file()
    table = read_calibration(given.folder) if held else Calibration([])
    if not (given.folder / PROMPTS).is_file():
        pool_of(load_pair(read_pair(given.pair), given.device)).write(given.folder / PROMPTS)
    pool = Pool.read(given.folder / PROMPTS)
    others = [c for c in table.cells if c.question != INTERVALS]
    table.cells = [*others, *coverage(pool, seed=given.seed, trials=given.trials)]
    said = {"pair": given.pair.stem, "prompts": len(pool.family), "trials": given.trials}
    table.provenance[POOL] = {**said, "seed": given.seed}
    write_calibration(table, given.folder)
    for path in write(given.folder):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
