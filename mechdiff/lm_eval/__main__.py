"""``python -m mechdiff.lm_eval``: the harness's own command line, with one more model in it.

1. The harness finds models in a registry that reads no entry points, so the model is registered here.
2. What follows is the command line of the harness, unchanged; ``--model mechdiff`` is its default.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from mechdiff.errors import in_one_line

NAME = "mechdiff"
"""What the model is called in the registry."""
VERBS = ("run", "ls", "validate")
MISSING = "lm-evaluation-harness is not installed; run: pip install 'mechdiff[lm_eval]'"


def arguments(given: Sequence[str]) -> list[str]:
    """Complete a command line of the harness: what is run without another model named is run with ours.

    >>> arguments(["--model_args", "pair=mine.yaml", "--tasks", "arc_easy"])
    ['run', '--model', 'mechdiff', '--model_args', 'pair=mine.yaml', '--tasks', 'arc_easy']
    >>> arguments(["run", "--model=hf"]), arguments(["ls", "tasks"]), arguments(["--help"])
    (['run', '--model=hf'], ['ls', 'tasks'], ['--help'])
    """
    verb, rest = (given[0], list(given[1:])) if given and given[0] in VERBS else ("run", list(given))
    named = any(arg.partition("=")[0] in ("--model", "-M") for arg in rest)
    if verb != "run" or named or not rest or {"-h", "--help"} & {*rest}:
        return list(given)
    return [verb, "--model", NAME, *rest]


@in_one_line
def main(given: Sequence[str] | None = None) -> int:
    """Run the harness; a user's mistake is one line and exit code 2.

    Args:
        given: Command line; ``sys.argv[1:]`` by default.
    """
    if find_spec("lm_eval") is None:
        print(f"mechdiff: {MISSING}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    import mechdiff.lm_eval.model  # noqa: F401 - registers the model

    asked, before = arguments(sys.argv[1:] if given is None else given), sys.argv
    sys.argv = ["mechdiff.lm_eval", *asked]  # the harness reads nothing else
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
