"""Run a batch in parts where the memory does not hold it whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mechdiff.errors import ConfigError

log = logging.getLogger(__name__)

Run = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Takes tokens `(texts, tokens)` and the wanted rows `(rows, 2)`, text and token; returns those rows."""


class Parts:
    """Runs batches in as many equal parts of whole texts as the memory asks for, and says so once.

    Padding stays as it was, but products with fewer rows may be rounded otherwise: the last digits of what is
    run in parts can differ from those of the whole.

    Args:
        role: Whose batches, for the message.
    """

    def __init__(self, role: str) -> None:
        self.role, self.count = role, 1

    def run(self, run: Run, input_ids: Tensor, where: Tensor) -> list[Tensor]:
        """Run a batch whole, or in the parts that were found to fit; halve them as long as they do not.

        Args:
            run: What runs some texts.
            input_ids: `(texts, tokens)`.
            where: Text and token of each wanted row, by text, `(rows, 2)`.

        Returns:
            What `run` returns for the whole batch.

        Raises:
            ConfigError: If the memory does not hold a single text.
        """
        while True:
            try:
                return self._attempt(run, input_ids, where)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
            texts, tokens = input_ids.shape  # outside of the clause, which keeps alive what did not fit
            if self.count >= texts:
                raise ConfigError(
                    f"{self.role}: the memory does not hold one text of {tokens} tokens; allowed: a device "
                    "with more, a smaller type, shorter prompts (keys: trainer.accelerator, pair.dtype, "
                    "pair.prompts)"
                )
            if self.count == 1:
                log.warning(
                    "%s: the memory does not hold %d texts of %d tokens; batches are run in halves, or "
                    "smaller (key: extraction.tokens_per_batch)",
                    self.role,
                    texts,
                    tokens,
                )
            self.count *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(self, run: Run, input_ids: Tensor, where: Tensor) -> list[Tensor]:
        if self.count == 1:
            return list(run(input_ids, where))
        found: list[Sequence[Tensor]] = []
        start = 0
        for texts in input_ids.tensor_split(min(self.count, len(input_ids))):
            inside = where[(where[:, 0] >= start) & (where[:, 0] < start + len(texts))]
            found.append(run(texts, inside - torch.tensor([start, 0], device=inside.device)))
            start += len(texts)
        return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _out_of_memory(error: BaseException) -> bool:
    """Tell whether a device, or the machine, had too little memory: only CUDA has a class for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in ("can't allocate memory", "out of memory"))
