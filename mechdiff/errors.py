"""What a user can get wrong, one class per kind.

Every message is one line that names the value, the allowed range and the configuration key. The command line
prints that line and exits with code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from mechdiff.files import blocked

REFUSED, INTERRUPTED = 2, 130
"""Exit codes: of what a user's mistake or a full disk ends, and after Ctrl-C, as a shell has it."""
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
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
            print(f"mechdiff: {said}", file=sys.stderr)
        return code

    return run


class UsageError(ValueError):
    """A mistake in what the user asked for; never a fault of this library."""


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
