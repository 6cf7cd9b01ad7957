"""CausalEvaluation: what is measured on the frozen pair after a module has been tested."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from mechdiff.config import SEED
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import FitError, PromptError
from mechdiff.functional.correlation import bootstrap_correlation
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.stats import bootstrap_mean, bootstrap_ratio, generator, measurable
from mechdiff.interventions.rounding import HALF, rounded
from mechdiff.modules.base import DiffModule, estimated, missing
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.fairness import FilterReport, filter_shared
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.results import Record

T = TypeVar("T")
ROUNDED_PROMPTS = 8
"""Prompts on which the effect of rounding is measured."""
_ROUNDING: WeakKeyDictionary[LoadedPair, dict[tuple[str, ...], float]] = WeakKeyDictionary()


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

    The command line connects it to the pair; the models are loaded when the first evaluation needs them, and
    are never children of the module.
    """

    seed: int = SEED
    splits: ClassVar[tuple[str, ...]] = ("eval",)

    def __init__(self) -> None:
        self.results: list[Record] = []
        self.items: list[Item] = []
        self.origin: dict[str, Any] = {}  # what else the numbers come from, for the provenance of the run
        self.rounding = 0.0  # nats that rounding the weights makes; no smaller gap is divided by
        self.progress = False
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

    def kept(
        self, pair: LoadedPair, prompts: Sequence[Prompt], most: int | None = None
    ) -> tuple[list[Prompt], FilterReport]:
        """Take prompts that both models can read, evenly over languages and classes.

        Args:
            pair: The models.
            prompts: What there is.
            most: How many; None takes all.

        Returns:
            The prompts, and what of all of them can be read.

        Raises:
            PromptError: If none is left.
        """
        found, report = readable(pair, prompts)
        return spread(found, most), report

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the evaluation once, on the first process."""
        assert self._pair is not None, "connect() comes before a test"
        assert isinstance(pl_module, DiffModule)
        if not trainer.is_global_zero:
            return
        prompts = [p for p in self._prompts if p.split in self.splits]
        if not prompts:
            raise PromptError(f"no prompt has split {' or '.join(self.splits)} (key: pair.prompts)")
        self.items, self.progress = [], trainer.progress_bar_callback is not None
        # Lightning tests in inference mode, whose tensors can never carry a gradient; these may need one.
        with torch.inference_mode(False), torch.no_grad():
            self.rounding = self.origin["rounding_nats"] = rounding_floor(self._pair(), self._prompts)
            self.results = list(self.evaluate(pl_module, self._pair(), prompts))

    def track(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """Show a progress bar over steps, if the trainer shows any.

        Args:
            steps: What is gone through.
            what: What is being done.
            total: How many steps there are, where their length cannot be asked.
        """
        return track(steps, what, total, disable=not self.progress, transient=True)

    def mean(self, values: Tensor, quantity: str, **about: Any) -> Record:
        """Return the record of a mean over prompts with its bootstrap interval.

        Args:
            values: One number per prompt, ``(n,)``.
            quantity: What was measured.
            **about: The other attributes of the record.
        """
        return estimated(quantity, bootstrap_mean(values, generator=self._generator(quantity, about)), about)

    def gap(self, values: Tensor, floor: float, about: dict[str, Any]) -> bool:
        """Say whether a mean over prompts is large enough to divide by: more than rounding explains.

        Args:
            values: One number per prompt, ``(n,)``.
            floor: What it is when nothing differs.
            about: Attributes of the record that divides by it.
        """
        gap = bootstrap_mean(values, generator=self._generator("gap", about))
        return measurable(gap, max(floor, self.rounding))

    def ratio(
        self, numerator: Tensor, denominator: Tensor, floor: float, quantity: str, **about: Any
    ) -> Record:
        """Return the record of ``1 − mean(numerator) / mean(denominator)``, unless the gap is too small.

        Args:
            numerator: One number per prompt, ``(n,)``.
            denominator: One number per prompt, ``(n,)``.
            floor: What the denominator measures when nothing differs.
            quantity: What was measured.
            **about: The other attributes of the record.
        """
        if not self.gap(denominator, floor, about):
            return missing(quantity, "gap_too_small", {**about, "n": len(denominator)})
        draws = self._generator(quantity, about)
        share = bootstrap_ratio(numerator, denominator, generator=draws, complement=True)
        return estimated(quantity, share, about)

    def correlation(
        self, x: Tensor, y: Tensor, classes: Sequence[str], quantity: str, **about: Any
    ) -> Record:
        """Return the record of a within-class correlation over prompts, unless one side does not vary.

        Args:
            x: One number per prompt, ``(n,)``.
            y: One number per prompt, ``(n,)``.
            classes: Class of each prompt.
            quantity: What was measured.
            **about: The other attributes of the record.
        """
        try:
            r = bootstrap_correlation(x, y, list(classes), generator=self._generator(quantity, about))
        except FitError:
            return missing(quantity, "gap_too_small", {**about, "n": len(x)})
        return estimated(quantity, r, about)

    def _generator(self, quantity: str, about: dict[str, Any]) -> torch.Generator:
        """The same resamples for an arm and its controls."""
        return generator(self.seed, quantity, about.get("site"), about.get("positions"))


def rounding_floor(pair: LoadedPair, prompts: Sequence[Prompt]) -> float:
    """Return how far a model of the pair is from itself with its weights rounded to bfloat16, nats.

    A pair of which one model was saved in half precision differs by as much for no other reason: that model
    is round already, so the larger number of the two counts. Of models that run in half precision there is
    nothing to round, and the floor is 0.

    Args:
        pair: The models.
        prompts: All prompts of the pair, of which a few of split eval are read, if there are any.
    """
    few = spread([p for p in prompts if p.split == "eval"] or prompts, ROUNDED_PROMPTS)
    key = tuple(p.text for p in few)
    held = _ROUNDING.setdefault(pair, {})
    if key not in held:
        held[key] = max(_rounding(loaded, few) for loaded in (pair.base, pair.tuned))
    return held[key]


@torch.no_grad()
def _rounding(loaded: LoadedModel, prompts: Sequence[Prompt]) -> float:
    if loaded.model.dtype in HALF:
        return 0.0
    texts = [encode(loaded.tokenizer, p.text).input_ids[: loaded.context_length] for p in prompts]
    plain = _ends(loaded.model, texts)
    with rounded(loaded.model):
        return float(kl_divergence(plain, _ends(loaded.model, texts)).mean())


def _ends(model: PreTrainedModel, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Return next-token log-probabilities after each text, `(texts, vocabulary)`."""
    batches = (torch.tensor([ids], device=model.device) for ids in tokens)
    rows = [model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1] for ids in batches]
    return torch.stack(rows).double().log_softmax(-1)


def readable(pair: LoadedPair, prompts: Sequence[Prompt]) -> tuple[list[Prompt], FilterReport]:
    """Keep the prompts that both models can read under the pair's tokenizer policy.

    Args:
        pair: The models.
        prompts: What there is.

    Raises:
        PromptError: If none is left.
    """
    required = pair.spec.tokenizer_policy == "shared_vocab_required"
    least = pair.spec.min_shared_coverage if required else 0.0
    return filter_shared(list(prompts), pair.base.tokenizer, pair.tuned.tokenizer, pair.shared, least)
