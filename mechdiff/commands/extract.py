"""``mechdiff extract``: fill the stores that a configuration needs, on the user's devices, and stop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from mechdiff.cli import MechdiffCLI
from mechdiff.cli import main as run
from mechdiff.modules import DiffModule

PASSED_ON = ("accelerator", "devices", "strategy", "num_nodes")


class ExtractCLI(MechdiffCLI):
    """Parses what a fit parses, extracts, and builds nothing."""

    def extraction_trainer(self) -> dict[str, Any]:
        """Use the trainer options of the configuration."""
        chosen = {name: self.cfg.trainer[name] for name in PASSED_ON}
        return super().extraction_trainer() | {k: v for k, v in chosen.items() if v is not None}

    def check_run(self, module: DiffModule) -> None:
        """Refuse nothing: whatever uses the stores, extraction can use every process."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    @rank_zero_only
    def after_instantiate_classes(self) -> None:
        """Say what is there now."""
        for role, store in self.stores.items():
            print(f"{role}: {len(store)} rows at {', '.join(map(str, store.sites))} in {store.folder}")
        self._scratch.cleanup()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def main(args: Sequence[str]) -> int:
    """Extract; a user's mistake is one line and exit code 2.

    Args:
        args: Command line after the verb.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mechdiff.extraction").setLevel(logging.INFO)  # how fast it went
    return run("fit", args, ExtractCLI)
