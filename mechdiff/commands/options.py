"""The parser of verbs that need no configuration: quick to import, mistakes in one line."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class Options(argparse.ArgumentParser):
    """Says what is wrong in one line instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        print(f"mechdiff: {message}; --help lists what is allowed", file=sys.stderr)
        raise SystemExit(2)
