"""``mechdiff study``: run RQ1 to RQ4 of one or more pairs, compare them, and write one report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from mechdiff.commands.options import Options
from mechdiff.errors import INTERRUPTED, REFUSED, ConfigError, refuse_secrets

if TYPE_CHECKING:
    from mechdiff.study import Step

ABOUT = (
    "Run RQ1 to RQ4 of each pair in order and write one report. What is done is not run again: the same "
    "command goes on where it stopped. Further options, such as --trainer.accelerator=cpu, go to every run."
)


def parser() -> Options:
    """Build the parser of the verb."""
    found = Options("mechdiff study", description=ABOUT, allow_abbrev=False)
    pair_help = "pair file; several make a contrast study"
    found.add_argument(
        "--pair", nargs="+", action="extend", required=True, type=Path, metavar="FILE", help=pair_help
    )
    found.add_argument("--questions", default="1,2,3,4", metavar="LIST", help="of 1 to 4; default: 1,2,3,4")
    found.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the study; default: runs/study_<pairs>"
    )
    found.add_argument(
        "--quick", action="store_true", help="few prompts and a reduced sweep, said on the page"
    )
    found.add_argument(
        "--configs", type=Path, default=Path("configs"), metavar="DIR", help="default: configs"
    )
    found.add_argument(
        "--no-figures", action="store_true", help="leave out the figures at the end of the page"
    )
    return found


class Remaining(ProgressColumn):
    """Time left: the expected minutes of what is left, at the pace of what is done."""

    def render(self, task: Task) -> Text:
        """Write it."""
        left = task.fields["left"] * task.fields["pace"] - task.fields["since"]()
        return Text("under a minute left" if left < 60 else f"about {left / 60:.0f} min left")


def main(args: Sequence[str]) -> int:
    """Run a study; a user's mistake is one line and exit code 2, Ctrl-C ends it with 130.

    Args:
        args: Command line after the verb.
    """
    refuse_secrets(args)  # the options of a study are kept with it
    return _study(*parser().parse_known_args(args))


def questions(text: str) -> list[str]:
    """Read a list of questions.

    Raises:
        ConfigError: If one is not known.
    """
    asked = [part.strip().removeprefix("rq") for part in text.split(",") if part.strip()]
    if not asked or set(asked) - set("1234"):
        raise ConfigError(f"questions is {text!r}; allowed: some of 1,2,3,4 (key: --questions)")
    return [f"rq{n}" for n in sorted(set(asked))]


def _study(given: argparse.Namespace, more: Sequence[str]) -> int:
    asked = questions(given.questions)
    from mechdiff.contrasts import compare
    from mechdiff.extraction.lock import alone
    from mechdiff.reporting.report.page import write_report
    from mechdiff.reporting.report.runs import read_study
    from mechdiff.study import claim, plan, read_pair

    names = [read_pair(path, more).name for path in given.pair]
    out = (given.out or Path("runs") / "_".join(["study", *names])).resolve()
    steps, without = plan(given.pair, asked, out, given.configs, given.quick, more)
    if not steps:
        raise ConfigError(f"nothing can be run: {'; '.join(without)} (key: --configs)")
    claim(out, given.pair, given.quick, more)
    console = Console()
    for line in without:
        console.print(f"left out: {line}", highlight=False)
    with alone(out, "--out"):
        failed = _run(steps, more, console)
        if not any(step.done for step in steps):
            return 2
        compare(read_study([out]))
        for path in write_report([out], out, not given.no_figures):
            console.print(f"report  {path}", soft_wrap=True, highlight=False)
        console.print(f"TensorBoard  tensorboard --logdir {out}", soft_wrap=True, highlight=False)
    return 2 if failed else 0


def _run(steps: Sequence[Step], more: Sequence[str], console: Console) -> list[Step]:
    """Run what is not done; return what failed."""
    from mechdiff.study import RUNS

    failed: list[Step] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), Remaining())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, left=0.0, pace=1.0, since=lambda: 0.0)
        for number, step in enumerate(steps):
            named = f"{step.name} {step.question}"
            if step.done:
                console.print(f"{named}: done before", highlight=False)
                continue
            if any(f.name == step.name and f.question == "rq1" for f in failed) and step.takes_layers:
                console.print(f"{named}: left out: its layers come from rq1, which failed", highlight=False)
                failed.append(step)
                continue
            if step.ended:
                console.print(f"{named}: run again: rq1 proposes other layers than it had", highlight=False)
            began = time.monotonic()
            left = sum(s.expected for s in steps[number:] if not s.done)
            said = f"{step.name} {step.question} ({number + 1} of {len(steps)})"
            since = lambda began=began: time.monotonic() - began  # noqa: E731 - read while it runs
            progress.update(task, description=said, left=left, pace=_pace(steps), since=since)
            step.begin()
            try:
                with step.log.open("w", encoding="utf-8") as log:
                    code = _call(RUNS[step.question][0], step.arguments(more), log)
            except (KeyboardInterrupt, SystemExit):
                console.print(f"{named}: interrupted; the same command goes on from it", highlight=False)
                raise
            seconds = time.monotonic() - began
            if code == 0:
                step.end(seconds)
                console.print(f"{named}: done in {seconds:.0f} s", highlight=False)
            else:
                failed.append(step)
                reason = step.log.read_text(encoding="utf-8").strip().splitlines()[-1:]
                console.print(
                    f"{named}: failed: {' '.join(reason)}",
                    soft_wrap=True,
                    highlight=False,
                )
    return failed


def _pace(steps: Sequence[Step]) -> float:
    """Return how long the finished steps took, as a share of what was expected."""
    done = [step for step in steps if step.done]
    expected = sum(step.expected for step in done)
    return sum(step.seconds for step in done) / expected if expected else 1.0


def _call(verb: str, args: Sequence[str], log: TextIO) -> int:
    """Run a verb of the command line in this process; the models stay loaded for the next question.

    Raises:
        KeyboardInterrupt: Where the user interrupts it.
        SystemExit: Where anything else but a user's mistake ends it.
    """
    from mechdiff.cli import main as run

    try:
        with redirect_stdout(log), redirect_stderr(log):
            code = run(verb, args)
    except SystemExit as left:
        if left.code == REFUSED:
            return REFUSED
        raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code
