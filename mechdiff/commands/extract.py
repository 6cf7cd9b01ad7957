"""``mechdiff extract``: fill the activation stores that a configuration needs, with the user's devices and strategy, and stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mechdiff.cli import MechdiffCLI, quiet
from mechdiff.errors import UsageError

PASSED_ON = ("accelerator", "devices", "strategy", "num_nodes", "precision")


class ExtractCLI(MechdiffCLI):
    """Parses what a fit parses, extracts, and builds nothing."""

    def extraction_trainer(self) -> dict[str, Any]:
        """Use the trainer options of the configuration."""
        return {name: self.cfg.trainer[name] for name in PASSED_ON if self.cfg.trainer.get(name) is not None}

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def after_instantiate_classes(self) -> None:
        """Say what is there now."""
        for role, store in self.stores.items():
            print(f"{role}: {len(store)} rows at {', '.join(map(str, store.sites))} in {store.folder}")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def main(args: Sequence[str]) -> int:
    """Extract; a user's mistake is one line and exit code 2.

    Args:
        args: Command line after the verb.
    """
    quiet()
    try:
        ExtractCLI("fit", args)
    except UsageError as error:
        print(f"mechdiff: {error}", file=sys.stderr)
        return 2
    return 0
