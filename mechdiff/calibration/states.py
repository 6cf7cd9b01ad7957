"""States of the messages of a case, held in memory as a store would serve them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from mechdiff.callbacks.handle_evaluation import two_engines, two_sides
from mechdiff.callbacks.states import read_ends
from mechdiff.data.activations import NOISE
from mechdiff.data.join import SPLITS
from mechdiff.data.prompts import Prompt
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.pairs.loading import LoadedPair

SHARES = (0.6, 0.2)
"""Of the prompts, to train and to choose on; the rest is the test."""


class CaseStates(L.LightningDataModule):
    """Serves the states of both models at the last token of each prompt.

    Args:
        pair: The models.
        prompts: Messages of the split fit, targets and neutral ones in turn.
        sites: Where.
    """

    def __init__(self, pair: LoadedPair, prompts: Sequence[Prompt], sites: Sequence[Site]) -> None:
        super().__init__()
        self.prompts = list(prompts)
        sides = two_sides(pair, self.prompts, two_engines(pair))
        self.states = [
            {str(site): rows for site, rows in read_ends(side, sites).states.items()} for side in sides
        ]
        self.noise = NOISE[str(pair.base.model.dtype).removeprefix("torch.")]
        pairs = len(self.prompts) // 2  # a target and its twin stay together
        first, second = (round(share * pairs) for share in (SHARES[0], sum(SHARES)))
        ends = (0, 2 * first, 2 * second, len(self.prompts))
        parts = zip(SPLITS, ends, ends[1:], strict=False)
        self.rows = {split: list(range(start, end)) for split, start, end in parts}

    @property
    def width(self) -> int:
        """Width of the states."""
        return next(iter(self.states[0].values())).shape[1]

    def options(self, sites: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of a module that come from its data."""
        return {"sites": list(sites), "d_source": self.width, "d_target": self.width, "noise": self.noise}

    def whole(self) -> Whole:
        """Return the same states with all prompts as the test, for what is not fitted."""
        return Whole(self)

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return some prompts as one batch."""
        index = torch.tensor(rows)
        source, target = ({site: x[index] for site, x in states.items()} for states in self.states)
        return {
            "source": source,
            "target": target,
            "prompt": index,
            "group": torch.full((len(index),), POSITIONS.index("last")),
            "label": torch.tensor([int(self.prompts[i].label == "target") for i in rows]),
        }

    def train_dataloader(self) -> DataLoader:
        """Return the training prompts as one batch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Return the prompts that choose as one batch."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Return the test prompts as one batch."""
        return self._loader("test")

    def _loader(self, split: str) -> DataLoader:
        return DataLoader([self.batch(self.rows[split])], batch_size=None)  # type: ignore[arg-type]


class Whole(L.LightningDataModule):
    """Serves all prompts of a case as the test.

    Args:
        states: What is served.
    """

    test_all = True

    def __init__(self, states: CaseStates) -> None:
        super().__init__()
        self.states, self.prompts = states, states.prompts

    def test_dataloader(self) -> DataLoader:
        """Return every prompt as one batch."""
        batch = self.states.batch(range(len(self.prompts)))
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
