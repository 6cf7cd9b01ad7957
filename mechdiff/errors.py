"""What a user can get wrong, one class per kind.

Every message is one line that names the value, the allowed range and the configuration key. The command line
prints that line and exits with code 2. A token of a hub or of a service is never part of one.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec

from mechdiff.files import blocked

REFUSED, INTERRUPTED = 2, 130
"""Exit codes: of what a user's mistake or a full disk ends, and after Ctrl-C, as a shell has it."""
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
_TOKEN = re.compile(r"\b(?:hf_|gh[opsu]_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")
_KEPT_IN = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_?KEY)$")
_LEAST = 12
"""Characters of a variable that is taken for a secret; shorter ones are switches."""
_LONGEST, LONGEST_LINE = 240, 1000
"""Characters of what another library says, and of a line about a command line."""
P = ParamSpec("P")


def in_one_line(verb: Callable[P, int]) -> Callable[P, int]:
    """Let a verb of the command line end with one line and an exit code, not with a traceback.

    That is for a user's mistake, for a place that cannot be written or read, and for Ctrl-C, which Lightning
    turns into an exit. Of several processes the first one speaks.

    Args:
        verb: What runs and returns an exit code.
    """

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            with _told_by_the_first_thread():
                return verb(*args, **kwargs)
        except UsageError as error:
            said, code = str(error), REFUSED
        except OSError as error:
            reason = blocked(error)
            if reason is None:
                raise
            said, code = reason, REFUSED
        except (KeyboardInterrupt, SystemExit) as left:
            if not any(isinstance(reason, KeyboardInterrupt) for reason in (left, left.__context__)):
                raise
            said, code = (
                "interrupted; what is complete is kept, and the same command goes on",
                INTERRUPTED,
            )
        if not any(int(os.environ.get(name) or 0) for name in _RANKS):
            print(f"mechdiff: {without_secrets(said)}", file=sys.stderr)
        return code

    return run


@contextmanager
def _told_by_the_first_thread() -> Iterator[None]:
    """Print no traceback of a thread that cannot write and keeps the error for whoever uses it next.

    The writer of TensorBoard is one: the first thread gets the same error when it writes more, or flushes.
    """

    def kept(thread: threading.Thread | None) -> bool:
        error = getattr(thread, "exception", None)
        return isinstance(error, OSError) and blocked(error) is not None

    def hook(args: threading.ExceptHookArgs) -> None:
        if not kept(args.thread):
            before(args)

    before, threading.excepthook = threading.excepthook, hook
    try:
        yield
    finally:
        for thread in filter(kept, threading.enumerate()):
            thread.join(1.0)
        threading.excepthook = before


class UsageError(ValueError):
    """A mistake in what the user asked for; never a fault of this library."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class ConfigError(UsageError):
    """A value in the configuration is out of range or contradicts another."""


class PairError(UsageError):
    """The two models cannot be loaded, or cannot be compared as asked."""


class PromptError(UsageError):
    """A prompt file is missing, malformed or does not hold what is needed."""


class SiteError(UsageError):
    """An activation site does not exist in the model."""


class StoreError(UsageError):
    """An activation store is missing, belongs to something else, or holds too little."""


class ActivationError(UsageError):
    """An activation is NaN or infinite."""


class FitError(UsageError):
    """A map cannot be fitted to what it was given."""


class FewPromptsError(FitError):
    """Too few prompts for what is to be estimated."""


class CheckpointError(UsageError):
    """A checkpoint is missing or belongs to another pair, layer or class."""


class HandleError(UsageError):
    """A handle cannot be exported, or its file is missing, malformed or made for another model."""


def cut(value: object, most: int = 60) -> str:
    """Write a value for a message: on one line, and no longer than that needs."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def told(error: BaseException) -> str:
    """Write what another library says of a mistake, on one line; the kind of error where that is needed."""
    kind = "" if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: "
    return printable(f"{kind}{error}").rstrip(": ")


def printable(text: str, most: int = _LONGEST) -> str:
    """Put a text on one line that a terminal only prints."""
    text = " ".join(text[: 4 * most].split())
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= most else f"{text[:most]}..."


def without_secrets(text: str) -> str:
    """Blank what looks like a token, and whatever the environment keeps as one."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


def refuse_secrets(words: Iterable[str]) -> None:
    """Refuse a token where it would be stored with the configuration of a run.

    Args:
        words: A command line, or the text of a configuration.

    Raises:
        ConfigError: If there is one; it is not repeated.
    """
    for word in words:
        if without_secrets(word) != word:
            option = without_secrets(word.partition("=")[0]) if word.startswith("--") else "the configuration"
            raise ConfigError(
                f"{option} holds a token, which would be kept with the run; use `hf auth login`"
            )


def _secrets() -> list[str]:
    named = [value for name, value in os.environ.items() if _KEPT_IN.search(name)]
    return sorted((value for value in named if len(value) >= _LEAST), key=len, reverse=True)
