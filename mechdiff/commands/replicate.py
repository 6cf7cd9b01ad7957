"""``mechdiff replicate``: say how much of a pair's numbers belongs to the seed of its training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechdiff.commands.options import Options

ABOUT = (
    "Read studies of siblings that one recipe made with different seeds, and write the spread between seeds "
    "beside the intervals within each run; no model is loaded."
)


def parser() -> Options:
    """Build the parser of the verb."""
    found = Options("mechdiff replicate", description=ABOUT)
    study_help = "folder of the study of one seed, named after it"
    found.add_argument("studies", nargs="+", metavar="STUDY", help=study_help)
    out_help = "where to write replication.json; default: the working directory"
    found.add_argument("--out", type=Path, default=Path(), metavar="DIR", help=out_help)
    return found


def main(args: Sequence[str]) -> int:
    """Compare seeds.

    Args:
        args: Command line after the verb.
    """
    given = parser().parse_args(args)
    from mechdiff.calibration.replication import FILE, replicate

    found = replicate(given.studies)
    path = found.write(given.out / FILE)
    for r in found:
        said = "too few seeds" if r.value is None else f"{r.low:g} to {r.high:g}, mean {r.value:.3g}"
        spread = {k.removeprefix("sd_"): v for k, v in r.params.items() if k.startswith("sd_")}
        print(f"{r.quantity}: {said} {r.unit}", *(f"{k} {v:.3g}" for k, v in spread.items()), sep="; sd ")
    print(path)
    return 0
