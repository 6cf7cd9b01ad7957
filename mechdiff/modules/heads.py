"""HeadComparison: nothing is fitted and no states are compared; the models' heads are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from mechdiff.modules.divergence import Batch, Divergence
from mechdiff.results import Question, Record


class HeadComparison(Divergence):
    """Carries a run whose callbacks measure everything; arguments as in `Divergence`."""

    question: ClassVar[Question] = "rq4"

    def on_test_start(self) -> None:
        """Have nothing to forget."""

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Look at nothing."""

    def ranking(self) -> dict[str, float]:
        """Rank no layer."""
        return {}

    def records(self) -> Iterator[Record]:
        """Have nothing to say: the callbacks have."""
        return iter(())
