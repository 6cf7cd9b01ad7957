"""Serve no states: for questions that are asked of the models alone, so that nothing is extracted."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.utils.data import DataLoader

from mechdiff.data.activations import ActivationPairs, Coverage
from mechdiff.data.manifest import Example


class NoStates(ActivationPairs):
    """A test of one empty batch; its settings are those of `ActivationPairs`, and none is used."""

    stored: ClassVar[bool] = False

    @property
    def d_source(self) -> int:
        """Width of base's states: there are none."""
        return 1

    @property
    def d_target(self) -> int:
        """Width of tuned's states: there are none."""
        return 1

    @property
    def noise(self) -> float:
        """Rounding of stored states: there are none."""
        return 0.0

    @property
    def prompts(self) -> list[Example]:
        """Prompts with states: none."""
        return []

    @property
    def coverage(self) -> list[Coverage]:
        """Share of aligned rows: there are none."""
        return []

    @property
    def split_key(self) -> str:
        """Name of the split: there is none."""
        return "none"

    def setup(self, stage: str) -> None:
        """Open nothing."""

    def test_dataloader(self) -> DataLoader:
        """Return one empty batch, so that a test runs and ends."""
        return DataLoader([{}], batch_size=None)  # type: ignore[arg-type]

    def _no_fit(self) -> Any:
        raise AssertionError("nothing is fitted to no states")

    train_dataloader = val_dataloader = _no_fit
