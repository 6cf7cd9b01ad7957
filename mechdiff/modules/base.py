"""DiffModule: a fitted relation between two models, and what it would do inside one of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mechdiff.errors import CheckpointError, FewPromptsError, FitError
from mechdiff.functional.cka import cka_jackknife
from mechdiff.functional.stats import Groups, Interval
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.results import Question, Record

if TYPE_CHECKING:
    from mechdiff.interventions.hooks import Edit

MIN_PROMPTS = 5
"""A delete-one interval of the debiased CKA needs as many prompts."""

UNTOUCHED = -1
"""Marks, in ``where``, a position that an edit leaves alone."""


class DiffModule(LightningModule):
    """A fitted relation between the activations of two models.

    It never holds a language model: it is fitted to stored activations, and what it does inside a frozen
    model is a pure function handed to ``intervene`` or to the suffix engine.

    Attributes:
        question: The research question that it serves.
        solver_name: How it is fitted.
        sites: Names of its target sites.
        sources: Name of the source site of each target site.
        positions: Groups of positions that it knows.
        needs_fit: Whether there is nothing to test before a fit.
    """

    question: ClassVar[Question]
    needs_fit: ClassVar[bool] = True
    solver_name: str
    sites: list[str]
    sources: list[str]
    positions: list[str]

    def alone(self, what: str, hint: str = "") -> None:
        """Refuse several processes, each of which would see a part of the rows.

        Args:
            what: What takes one process.
            hint: What to do instead.

        Raises:
            FitError: If there is more than one.
        """
        if self.trainer.world_size > 1:
            got = f"trainer.devices gives {self.trainer.world_size} processes"
            raise FitError(f"{got}; allowed {what}: 1{hint}")

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether there is anything to test."""

    @classmethod
    def operations(
        cls, rows: int, sites: int, d_source: int, d_target: int, matrix: bool = False
    ) -> float | None:
        """Return the floating-point operations of a fit, None where they are not known beforehand.

        Args:
            rows: Rows of the stores.
            sites: Number of sites.
            d_source: Width of the source.
            d_target: Width of the target.
            matrix: Whether every source site meets every target site.
        """
        return None

    def ranking(self) -> dict[str, float]:
        """Return how much the models differ at each site, where a test has said so."""
        return {}

    def controls(self) -> list[str]:
        """Return the kinds of edit that serve as controls."""
        return []

    @abstractmethod
    def edits(self, donor: Mapping[Site, Tensor] | None, where: Tensor, **cell: Any) -> Mapping[Site, Edit]:
        """Return what to do to a running model.

        Args:
            donor: Activations in the recipient's rows, ``(batch, position, d)`` by site; None where none are
                needed.
            where: Index into ``POSITIONS``, ``(batch, position)``; ``UNTOUCHED`` leaves a position as it is.
            **cell: Which of the possible edits (kind, site, k, alpha, ...).
        """

    @abstractmethod
    def records(self) -> Iterable[Record]:
        """Return what the test split said; valid after ``trainer.test``."""


def over_processes(values: Tensor) -> Tensor:
    """Return the sum of what all processes have; the values themselves where there is one."""
    if not torch.distributed.is_initialized():
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def shares(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Say what a mean over this process's rows counts for in the mean over the rows of all.

    Gradients are averaged over processes, with as much weight for a process that has few rows of a kind.

    Args:
        counts: Rows of each kind that this process has.

    Returns:
        Factors for the means, 1 with one process, and the rows of all processes.
    """
    total = over_processes(counts)
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return counts * processes / total.clamp_min(1), total


def estimated(quantity: str, estimate: Interval, about: Mapping[str, Any]) -> Record:
    """Make the record of an estimate; an end that resampling could not bound is None and flagged.

    Args:
        quantity: What was measured.
        estimate: The number with its interval.
        about: The other attributes of the record; `n` is the estimate's own.
    """
    low, high = (end if math.isfinite(end) else None for end in (estimate.low, estimate.high))
    flags = (*about.get("flags", ()), *(("unbounded_interval",) if None in (low, high) else ()))
    attributes = {**about, "n": estimate.n, "flags": flags}
    return Record(quantity=quantity, value=estimate.value, low=low, high=high, **attributes)


def similarity(
    quantity: str,
    x: Tensor,
    y: Tensor,
    prompt: Groups,
    about: Mapping[str, Any],
    within: Groups | None = None,
) -> Record:
    """Make the record of a linear CKA with its delete-one-prompt interval, if it is defined.

    Args:
        quantity: ``cka`` or ``cka_debiased``.
        x: ``(rows, d_x)``.
        y: ``(rows, d_y)``, the same rows.
        prompt: Prompt of each row.
        about: The other attributes of the record.
        within: Class of each row, to compare within classes.
    """
    if about["n"] < MIN_PROMPTS:
        return missing(quantity, "too_few_prompts", about)
    debiased = quantity == "cka_debiased"
    try:
        found = cka_jackknife(x, y, debiased=debiased, groups=prompt, within=within)
    except FewPromptsError:  # in any class
        return missing(quantity, "too_few_prompts", about)
    except FitError:  # one side does not vary
        return missing(quantity, "no_variance", about)
    return estimated(quantity, found, about)


def missing(quantity: str, reason: str, about: Mapping[str, Any]) -> Record:
    """Make the record of a quantity that has no value.

    Args:
        quantity: What was to be measured.
        reason: Why there is no value, a short word.
        about: The other attributes of the record.
    """
    return Record(quantity=quantity, value=None, reason=reason, **about)


def refuse_other_fit(module: Any, checkpoint: dict[str, Any], other: str) -> None:
    """Refuse a checkpoint whose buffers have other shapes, or that was fitted in another way.

    Args:
        module: What it is loaded into; its ``settings()`` are those that must be shared.
        checkpoint: What was saved.
        other: What to say of other shapes.

    Raises:
        CheckpointError: If it is.
    """
    state, own = checkpoint["state_dict"], module.state_dict()
    if {name: part.shape for name, part in state.items()} != {n: part.shape for n, part in own.items()}:
        raise CheckpointError(f"the checkpoint holds {other} differ (key: ckpt_path)")
    saved = dict(checkpoint.get("hyper_parameters", {}))
    saved["source_sites"] = saved.get("source_sites") or saved.get("sites")
    saved["positions"] = [name for name in POSITIONS if name in saved.get("positions", ())]
    for name, want in module.settings().items():
        have = list(saved[name]) if isinstance(saved.get(name), tuple) else saved.get(name)
        if name in saved and have != want:
            fitted = f"the checkpoint was fitted with {name} {have}, not {want}"
            raise CheckpointError(f"{fitted}; give one of this configuration (key: ckpt_path)")
