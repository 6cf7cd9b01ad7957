"""CausalEvaluation: what is measured on the frozen pair after a module has been tested."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mechdiff.config import SEED
from mechdiff.data.prompts import Prompt
from mechdiff.errors import FitError
from mechdiff.functional.stats import (
    Interval,
    bootstrap_correlation,
    bootstrap_mean,
    bootstrap_ratio,
    generator,
    measurable,
)
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.loading import LoadedPair
from mechdiff.results import Record


@dataclass(frozen=True)
class Item:
    """One prompt's share of a record: what intervals between runs and pairs are drawn from.

    Attributes:
        prompt: Prompt id.
        quantity: Name of the quantity.
        site: Activation site.
        positions: Group of positions.
        direction: ``into_tuned`` or ``into_base``.
        arm: What was done.
        value: The number.
    """

    prompt: str
    quantity: str
    site: str
    positions: str
    direction: str
    arm: str
    value: float


class CausalEvaluation(Callback):
    """Runs interventions on the frozen models when a test has ended.

    The command line connects it to the pair; the models are loaded when the first evaluation needs them, and are never children of the module.
    """

    seed: int = SEED
    splits: ClassVar[tuple[str, ...]] = ("eval",)

    def __init__(self) -> None:
        self.results: list[Record] = []
        self.items: list[Item] = []
        self._pair: Callable[[], LoadedPair] | None = None
        self._prompts: Sequence[Prompt] = ()

    def connect(self, pair: Callable[[], LoadedPair], prompts: Sequence[Prompt], seed: int) -> None:
        """Give the evaluation what it runs on.

        Args:
            pair: Returns the pair; called when needed.
            prompts: All prompts of the pair; the callback picks its splits.
            seed: Seed of resampling.
        """
        self._pair, self._prompts, self.seed = pair, prompts, seed

    @abstractmethod
    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Measure on the frozen pair.

        Args:
            module: The fitted relation.
            pair: The frozen models.
            prompts: Prompts of ``splits``, in file order.
        """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the evaluation once, on the first process."""
        assert self._pair is not None, "connect() comes before a test"
        assert isinstance(pl_module, DiffModule)
        prompts = [p for p in self._prompts if p.split in self.splits]
        if not trainer.is_global_zero:
            return
        self.items = []
        # Lightning tests in inference mode, whose tensors can never carry a gradient; an evaluation may need them to.
        with torch.inference_mode(False), torch.no_grad():
            self.results = list(self.evaluate(pl_module, self._pair(), prompts))

    def mean(self, values: Tensor, name: str, **record: Any) -> Record:
        """Return the record of a mean over prompts with its bootstrap interval.

        Args:
            values: One number per prompt, ``(n,)``.
            name: Quantity.
            **record: The other attributes of the record.
        """
        return Record(
            quantity=name,
            **interval(bootstrap_mean(values, generator=self._generator(name, record))),
            **record,
        )

    def ratio(self, numerator: Tensor, denominator: Tensor, floor: float, name: str, **record: Any) -> Record:
        """Return the record of ``1 − mean(numerator) / mean(denominator)``, or say that the gap is too small to divide by.

        Args:
            numerator: One number per prompt, ``(n,)``.
            denominator: One number per prompt, ``(n,)``.
            floor: What the denominator measures when nothing differs.
            name: Quantity.
            **record: The other attributes of the record.
        """
        gap = bootstrap_mean(denominator, generator=self._generator("gap", record))
        if not measurable(gap, floor):
            return Record(quantity=name, value=None, n=gap.n, reason="gap_too_small", **record)
        draws = self._generator(name, record)
        return Record(
            quantity=name,
            **interval(bootstrap_ratio(numerator, denominator, generator=draws, complement=True)),
            **record,
        )

    def correlation(self, x: Tensor, y: Tensor, classes: Sequence[str], name: str, **record: Any) -> Record:
        """Return the record of a within-class correlation over prompts, or say that one side does not vary.

        Args:
            x: One number per prompt, ``(n,)``.
            y: One number per prompt, ``(n,)``.
            classes: Class of each prompt.
            name: Quantity.
            **record: The other attributes of the record.
        """
        try:
            estimate = bootstrap_correlation(x, y, list(classes), generator=self._generator(name, record))
        except FitError:
            return Record(quantity=name, value=None, n=len(x), reason="gap_too_small", **record)
        return Record(quantity=name, **interval(estimate), **record)

    def _generator(self, name: str, record: dict[str, Any]) -> torch.Generator:
        return generator(self.seed, name, record.get("site"), record.get("positions"))


def interval(estimate: Interval) -> dict[str, Any]:
    """Return an interval as attributes of a record; an end that resampling could not bound is None and flagged."""
    ends = {"low": estimate.low, "high": estimate.high}
    bounded = {name: end if math.isfinite(end) else None for name, end in ends.items()}
    flags = () if None not in bounded.values() else ("unbounded_interval",)
    return {"value": estimate.value, "n": estimate.n, "flags": flags, **bounded}
