"""DiffModule: a fitted relation between two models, and what it would do inside one of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor

from mechdiff.interventions.sites import Site
from mechdiff.results import Question, Record

if TYPE_CHECKING:
    from mechdiff.interventions.hooks import Edit

UNTOUCHED = -1
"""Marks, in ``where``, a position that an edit leaves alone."""


class DiffModule(LightningModule):
    """A fitted relation between the activations of two models.

    It never holds a language model: it is fitted to stored activations, and what it does inside a frozen model is a pure function handed to
    ``intervene`` or to the suffix engine.

    Attributes:
        question: The research question that it serves.
        solver_name: How it is fitted.
        sites: Names of its target sites.
        sources: Name of the source site of each target site.
        positions: Groups of positions that it knows.
    """

    question: ClassVar[Question]
    solver_name: str
    sites: list[str]
    sources: list[str]
    positions: list[str]

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether there is anything to test."""

    def controls(self) -> list[str]:
        """Return the kinds of edit that serve as controls."""
        return []

    @abstractmethod
    def edits(self, donor: Mapping[Site, Tensor] | None, where: Tensor, **cell: Any) -> Mapping[Site, Edit]:
        """Return what to do to a running model.

        Args:
            donor: The other model's activations in the recipient's rows, ``(batch, position, d)`` by source site; None where none is needed.
            where: Index into the positions groups, ``(batch, position)``; ``UNTOUCHED`` leaves a position as it is.
            **cell: Which of the possible edits (kind, site, k, alpha, ...).
        """

    @abstractmethod
    def records(self) -> Iterable[Record]:
        """Return what the test split said; valid after ``trainer.test``."""
