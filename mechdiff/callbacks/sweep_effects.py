"""What edits of the last position do to target prompts: recovery of the other model, cheaply for many edits.

1. Into base, recovery is `1 − KL(tuned ‖ edited base) / KL(tuned ‖ base)` over shared tokens; into tuned the
   models change places.
2. Both models read every prompt once. All edits of a prompt are rows of one batch of single tokens, which
   runs through the blocks above the site alone, on kept keys and values.
3. The first row is the model as it is: how far it is from itself is the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.callbacks.handle_evaluation import Handle, same_end, two_sides
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.states import read_last
from mechdiff.data.prompts import Prompt, spread
from mechdiff.functional.metrics import kl_divergence, kl_from_logits
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.loading import LoadedPair

INTO_TUNED = ("ablate", "reverse")
"""Edits of tuned; all others are of base."""
ROWS = 128


def direction(kind: str) -> str:
    """Return which model an edit is made in."""
    return "into_tuned" if kind in INTO_TUNED else "into_base"


class Arms(NamedTuple):
    """What edits do to each prompt.

    Attributes:
        nats: KL of the other model from the edited one, `(prompts, edits)`, float64.
        size: Length of the edit, the same shape.
        gap: KL of the other model from the one as it is, `(prompts,)`.
        noise: KL of that one from itself, on average.
        usual: Median length of its states.
    """

    nats: Tensor
    size: Tensor
    gap: Tensor
    noise: float
    usual: float

    def recovery(self, rows: slice | Sequence[int] = slice(None)) -> Tensor:
        """Return the share of the divergence that each edit removes, on some prompts, `(edits,)`."""
        return 1 - self.nats[rows].mean(0) / self.gap[rows].mean()

    def pick(self, edits: Sequence[int]) -> Arms:
        """Return some of the edits."""
        return self._replace(nats=self.nats[:, list(edits)], size=self.size[:, list(edits)])


class Targets:
    """Target prompts of one split as both models read them.

    Args:
        pair: The models.
        engines: Theirs.
        prompts: The prompts; those that end at another place for the two models are left out.
        sites: Sites whose states are needed.

    Attributes:
        prompts: Those that are left.
        base: Base's reading of them.
        tuned: Tuned's.
    """

    def __init__(
        self,
        pair: LoadedPair,
        engines: tuple[SuffixEngine, SuffixEngine],
        prompts: Sequence[Prompt],
        sites: Sequence[Site],
    ) -> None:
        same = same_end(*two_sides(pair, prompts, engines))
        self.prompts = [p for p, able in zip(prompts, same, strict=True) if able]
        self.base, self.tuned = two_sides(pair, self.prompts, engines)
        for side in (self.base, self.tuned):
            read_last(side, sites)

    def sides(self, where: str) -> tuple[Side, Side]:
        """Return the edited model and the other."""
        return (self.tuned, self.base) if where == "into_tuned" else (self.base, self.tuned)

    def states(self, index: int, site: Site, where: str) -> tuple[Tensor, Tensor]:
        """Return the last state of a prompt in the edited model and in the other, `(1, d)`."""
        own, donor = (side.states[index][site] for side in self.sides(where))
        return own, donor.to(own)

    def few(self, most: int) -> list[int]:
        """Return some of the prompts, evenly over languages."""
        taken = set(spread(self.prompts, most))
        return [i for i, prompt in enumerate(self.prompts) if prompt in taken]

    def run(
        self,
        site: Site,
        where: str,
        edited: Callable[[int], Tensor],
        prompts: Sequence[int] | None = None,
    ) -> Arms:
        """Measure edits.

        Args:
            site: Where they act.
            where: ``into_base`` or ``into_tuned``.
            edited: Returns the edited states of a prompt, `(edits, d)`.
            prompts: Numbers of those that are read; None takes all.
        """
        mine, other = self.sides(where)
        nats: list[Tensor] = []
        size, gap, norms = [], [], []
        noise: list[Tensor] = []
        for index in range(len(self.prompts)) if prompts is None else prompts:
            own = mine.states[index][site]
            rows = torch.cat([own, edited(index).to(own)])
            reference, kept = other.log_p[index].to(own.device), mine.log_p[index]
            found = []
            for part in rows.split(ROWS):
                logits = self._logits(mine, index, site, part)
                found.append(kl_from_logits(reference, logits))
                if len(noise) == len(nats):
                    noise.append(kl_from_logits(kept, logits[:1]).abs().cpu())
            nats.append(torch.cat(found)[1:].cpu())
            size.append((rows[1:] - own).double().norm(dim=-1).cpu())
            gap.append(kl_divergence(reference, kept).cpu())
            norms.append(own.double().norm().cpu())
        return Arms(
            torch.stack(nats),
            torch.stack(size),
            torch.stack(gap),
            float(torch.cat(noise).mean()),
            float(torch.stack(norms).median()),
        )

    def sweep(self, module: DiffModule, site: Site, cells: Sequence[Handle]) -> Arms:
        """Measure cells of one site that are edits of the same model."""
        where = direction(cells[0].kind)
        assert {direction(cell.kind) for cell in cells} == {where}

        def edited(index: int) -> Tensor:
            own, donor = self.states(index, site, where)
            return torch.cat([cell.change(module, own, donor) for cell in cells])

        return self.run(site, where, edited)

    def _logits(self, side: Side, index: int, site: Site, states: Tensor) -> Tensor:
        """Return logits over the shared tokens, `(rows, shared)`."""
        ids = side.ids(index)[:, -1:].expand(len(states), -1)
        logits = side.engine.resume(site.layer, states[:, None], ids, prefix=side.prefixes[index])
        everything = torch.arange(logits.shape[-1], device=logits.device)
        return logits if torch.equal(side.shared, everything) else logits.index_select(-1, side.shared)
