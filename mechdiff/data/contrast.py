"""Serve paired states with the class of their prompt, and check the classes of prompts for dev and eval.

1. A batch is that of `ActivationPairs` and, for each row, whether its prompt is a target or neutral.
2. Every split must hold both classes: prompts are dealt to the splits by language and class.
3. Dev and eval need enough neutral prompts to bound a side effect: n prompts without a change still allow
   the rate at which n would show none in one of twenty draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mechdiff.config import SEED, VAL_FRACTION
from mechdiff.data.activations import ActivationPairs
from mechdiff.data.join import SPLITS
from mechdiff.data.prompts import Label, Prompt, Split, select
from mechdiff.errors import PromptError, StoreError
from mechdiff.functional.proportions import binomial_interval

NEED = 120
"""Neutral prompts wanted in dev and in eval."""
BOUND = 0.05
"""Largest drop of neutral behaviour, a fraction, that a handle may cause."""


class ContrastPairs(ActivationPairs):
    """Aligned activations of two models on target and neutral prompts.

    A batch also has `"label": (rows,)`, 1 for a target and 0 for a neutral prompt.

    Args:
        source: Folder of the source model's store; the command line fills in this one and the next two.
        target: Folder of the target model's store.
        sites: Sites of the target.
        source_sites: The source site for each of them; the same ones by default.
        positions: Groups of rows to serve, some of `last`, `user`, `template`.
        tokens: Aligned rows that there must be at least; None for no such demand.
        val_frac: Share of the groups of prompts used for validation, and again for the test.
        test_all: Serve all prompts as the test, for what is not fitted.
        batch_size: Rows of a batch.
        num_workers: Processes that read.
        seed: Seed of the split and of the order of training.
    """

    def __init__(
        self,
        source: str = "",
        target: str = "",
        sites: list[str] | tuple[str, ...] = (),
        source_sites: list[str] | None = None,
        positions: list[str] = ["last"],  # noqa: B006 - never changed; shown by --help
        tokens: int | None = None,
        val_frac: float = VAL_FRACTION,
        test_all: bool = False,
        batch_size: int = 4096,
        num_workers: int = 0,
        seed: int = SEED,
    ) -> None:
        super().__init__(
            source,
            target,
            sites,
            source_sites,
            positions,
            tokens,
            val_frac,
            test_all,
            batch_size,
            num_workers,
            seed,
        )

    @cached_property
    def labels(self) -> Tensor:
        """Class of each prompt, `(prompts,)`: 1 target, 0 neutral."""
        return torch.tensor([int(example.label == "target") for example in self.prompts])

    def setup(self, stage: str) -> None:
        """Join the stores, and find both classes in every split.

        Raises:
            StoreError: If a split lacks a class.
        """
        super().setup(stage)
        for split in ("test",) if self.test_all else SPLITS:
            found = self.labels[self.joined.prompt[self.rows(split)]]
            for value, name in ((1, "target"), (0, "neutral")):
                if not (found == value).any():
                    where = ", ".join(self.positions)
                    raise StoreError(
                        f"split {split} has no {name} rows at {where}; allowed: prompts of split fit with "
                        "both labels, in 3 or more groups each (keys: data.positions, pair.prompts)"
                    )

    def read(self, rows: Tensor) -> dict[str, Any]:
        """Read rows of the join as one batch."""
        return _labelled(super().read(rows), self.labels)

    def _loader(self, split: str) -> DataLoader:
        plain = super()._loader(split)
        data = _Labelled(plain.dataset, self.labels)
        return DataLoader(data, batch_size=None, sampler=plain.sampler, num_workers=self.num_workers)


class Contrast(NamedTuple):
    """The prompts of a split by class."""

    target: list[Prompt]
    neutral: list[Prompt]


def contrast(prompts: Sequence[Prompt], split: Split) -> Contrast:
    """Divide the prompts of a split by class.

    Args:
        prompts: All prompts.
        split: Which of them.

    Raises:
        PromptError: If a class is empty.
    """
    names: tuple[Label, ...] = get_args(Label)
    return Contrast(**{name: select(prompts, split, name) for name in names})


def check_bound(prompts: Sequence[Prompt], split: Split, need: int = NEED) -> list[Prompt]:
    """Return the neutral prompts of a split if they are enough to bound a side effect.

    Args:
        prompts: All prompts.
        split: ``dev`` or ``eval``.
        need: How many there must be.

    Raises:
        PromptError: If there are fewer.
    """
    neutral = [p for p in prompts if p.split == split and p.label == "neutral"]
    if len(neutral) < need:
        allows = f"{_allowed(len(neutral)):.1%}" if neutral else "anything"
        raise PromptError(
            f"split {split} has {len(neutral)} neutral prompts, which allow {allows} even if none changes; "
            f"allowed: {need} or more ({needed()} bound {BOUND:.0%} if none changes) (key: pair.prompts)"
        )
    return neutral


def needed(bound: float = BOUND) -> int:
    """Return how many prompts, none of them changed, bound a rate of change.

    Args:
        bound: The rate, a fraction above 0 and below 1.
    """
    assert 0 < bound < 1, f"a bound of {bound}"
    return next(n for n in count(1) if _allowed(n) <= bound)


def _allowed(n: int) -> float:
    return binomial_interval(0, n, side="upper").high


class _Labelled(Dataset):
    """Batches of another dataset with the class of every row."""

    def __init__(self, plain: Dataset, labels: Tensor) -> None:
        self.plain, self.labels = plain, labels

    def __getitem__(self, rows: Tensor) -> dict[str, Any]:
        return _labelled(self.plain[rows], self.labels)


def _labelled(batch: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    return {**batch, "label": labels[batch["prompt"]]}
