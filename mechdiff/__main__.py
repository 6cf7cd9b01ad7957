"""The ``mechdiff`` command; each verb is a module of ``mechdiff.commands``, imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

import mechdiff
from mechdiff.errors import cut, in_one_line, without_secrets

VERBS = {
    "extract": "extract the activations that a configuration needs, on any number of devices, and stop",
    "export": "take a handle out of its run: a file for mechdiff.steer, or a control vector for llama.cpp",
    "study": "run RQ1 to RQ4 of one or more pairs, resume what was cut off, and write one report",
    "report": "draw one page from the records of runs, without a model",
    "replicate": "say how much of a pair's numbers belongs to the seed of its training, from several studies",
    "calibrate": "plant differences whose answer is known, and count how often the methods find them",
    "doctor": "say what is installed, which models and stores are in reach, and what is wrong",
}

COMPLETION = "completion"
"""Prints what makes a shell complete the verbs."""


@in_one_line
def main(args: list[str] | None = None) -> int:
    """Run a verb; a user's mistake is one line and exit code 2, Ctrl-C ends it with 130.

    Args:
        args: Command line; ``sys.argv[1:]`` by default.
    """
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["--version"]:
        print(f"mechdiff {mechdiff.__version__}")
        return 0
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == COMPLETION:
        print(f"complete -o default -W '{' '.join(VERBS)}' mechdiff")
        return 0
    if args[0] not in VERBS:
        told = f"unknown command {cut(args[0])}; allowed: {', '.join(VERBS)}"
        print(f"mechdiff: {without_secrets(told)}", file=sys.stderr)
        return 2
    return int(import_module(f"mechdiff.commands.{args[0]}").main(args[1:]))


def _help() -> str:
    verbs = "\n".join(f"  {name:<11}{what}" for name, what in VERBS.items())
    usage = "usage: mechdiff [--version] <command> [--help] ..."
    more = f'Shell completion: eval "$(mechdiff {COMPLETION})" in bash, or in zsh after bashcompinit.'
    return f"{usage}\n\ncommands:\n{verbs}\n\nFit and test with train.py and evaluate.py.\n{more}"


if __name__ == "__main__":
    raise SystemExit(main())
