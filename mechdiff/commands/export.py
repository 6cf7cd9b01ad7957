"""``mechdiff export``: take a handle out of its run, to use it elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser

from mechdiff.errors import LONGEST_LINE, printable, without_secrets


def export(
    run: str,
    edit: str | None = None,
    k: int | None = None,
    alpha: float | None = None,
    site: str | None = None,
    solver: str | None = None,
    positions: str = "answer",
    results: str | None = None,
    out: str | None = None,
) -> list[str]:
    """Take a handle out of its run, to use it elsewhere.

    Args:
        run: Folder of a run that fitted a SteeringSubspace, or one of its checkpoints.
        edit: add, mapped or amplify in base, ablate in tuned; what the run chose by default.
        k: Number of directions; what the run chose for this edit by default.
        alpha: Strength, 1 is the whole natural edit; what the run chose for this edit by default.
        site: Where it acts, such as resid_post.12; what the run chose for this edit by default.
        solver: Who found the directions; what the run chose, or else the handle's own estimator.
        positions: answer edits the prompt's last token and all of the answer, as it was measured; all every
            token but the first.
        results: The results.json that names the chosen handle; the run's own by default.
        out: A .safetensors file for mechdiff.steer, or a .gguf control vector for llama.cpp (add only);
            <run>/handles/<edit>-k<k>-<site>.safetensors by default.

    Returns:
        What was written, in words.

    Raises:
        UsageError: If there is no such handle, or it cannot leave its pair.
    """
    from mechdiff.commands.exporting import write_out  # brings torch along, which --help can do without

    cell = {"edit": edit, "k": k, "alpha": alpha, "site": site, "solver": solver}
    return write_out(run, cell, positions, results, out)


class _Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        from mechdiff.parser import shorten

        line = printable(without_secrets(shorten(message)), LONGEST_LINE)
        print(f"mechdiff: {line}", file=sys.stderr)
        raise SystemExit(2)


def main(args: Sequence[str]) -> int:
    """Export; a user's mistake is one line and exit code 2.

    Args:
        args: Command line after the verb.
    """
    parser = _Parser(prog="mechdiff export", description=(export.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(export, as_positional=True)
    given = parser.parse_args(list(args))
    from mechdiff.parser import quiet

    quiet()
    print("\n".join(export(**given.as_dict())))
    return 0
