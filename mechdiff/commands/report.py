"""``mechdiff report``: draw one page from the records of runs, without a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mechdiff.errors import UsageError

ABOUT = "Draw report.html and report.md from the records of runs; no model is loaded."


def parser() -> argparse.ArgumentParser:
    """Build the parser of the verb."""
    found = argparse.ArgumentParser("mechdiff report", description=ABOUT)
    runs_help = "folder of a run or of a study, or a results.json"
    found.add_argument("runs", nargs="+", metavar="RUN", help=runs_help)
    found.add_argument("--out", metavar="DIR", help="where to write; by default the folder of the first run")
    found.add_argument(
        "--no-figures", action="store_true", help="leave out the figures at the end of the page"
    )
    return found


def main(args: Sequence[str]) -> int:
    """Draw a report; a user's mistake is one line and exit code 2.

    Args:
        args: Command line after the verb.
    """
    given = parser().parse_args(args)
    from mechdiff.reporting.report.page import write_report

    first = Path(given.runs[0])
    try:
        written = write_report(
            given.runs, given.out or (first if first.is_dir() else first.parent), not given.no_figures
        )
    except UsageError as error:
        print(f"mechdiff: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0
