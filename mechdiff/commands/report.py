"""``mechdiff report``: draw one page from the records of runs, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechdiff.commands.options import Options

ABOUT = "Draw report.html and report.md from the records of runs; no model is loaded."


def parser() -> Options:
    """Build the parser of the verb."""
    found = Options("mechdiff report", description=ABOUT)
    runs_help = "folder of a run or of a study, or a results.json"
    found.add_argument("runs", nargs="+", metavar="RUN", help=runs_help)
    found.add_argument("--out", metavar="DIR", help="where to write; by default the folder of the first run")
    found.add_argument(
        "--no-figures", action="store_true", help="leave out the figures at the end of the page"
    )
    records_help = "write every record as one table, too: .csv or .parquet"
    found.add_argument("--records", metavar="FILE", help=records_help)
    return found


def main(args: Sequence[str]) -> int:
    """Draw a report; a user's mistake is one line and exit code 2.

    Args:
        args: Command line after the verb.
    """
    given = parser().parse_args(args)
    from mechdiff.reporting.export import write_records
    from mechdiff.reporting.report.page import write_report

    first = Path(given.runs[0])
    out = given.out or (first if first.is_dir() else first.parent)
    tables = [write_records(given.runs, given.records)] if given.records else []
    for path in [*write_report(given.runs, out, not given.no_figures), *tables]:
        print(path)
    return 0
