"""How much memory this process needed, and a fit apart from the test that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Phases(Callback):
    """Notes the peak of a fit by itself, so that what follows is the peak of the test, and what is tested."""

    fit = tested = 0.0  # of the process, in MiB

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the peak and begin anew."""
        Phases.fit, Phases.tested = highest(), 0.0
        forget()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        """Add what a batch holds."""
        rows = [*batch["source"].values(), *batch["target"].values()]
        Phases.tested += sum(part.nbytes for part in rows) / 2**20


def forget() -> None:
    """Begin anew: what this process needed so far does not count."""
    Path("/proc/self/clear_refs").write_text("5")


def highest() -> float:
    """Return the most memory that this process needed, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
