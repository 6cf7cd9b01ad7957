"""The parser of verbs that need no configuration: quick to import, mistakes in one line."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from mechdiff.errors import LONGEST_LINE, printable, without_secrets


class Options(argparse.ArgumentParser):
    """Says what is wrong in one line instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        print(
            f"mechdiff: {printable(without_secrets(message), LONGEST_LINE)}; --help lists what is allowed",
            file=sys.stderr,
        )
        raise SystemExit(2)
