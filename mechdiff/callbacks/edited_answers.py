"""Answer prompts that have been read already, with an edit on the last token and on every token said.

Only answers whose edit needs the other model end at a token that it does not have: they are decoded apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.callbacks.handle_evaluation import Handle
from mechdiff.callbacks.patcher import Side
from mechdiff.interventions.generation import Reach
from mechdiff.interventions.hooks import Edit
from mechdiff.interventions.lockstep import Follower, Rows, decode, padded_together
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import DiffModule

NEEDS_DONOR = ("interchange", "reverse")
"""Edits that need the other model's state at every token."""


ROWS = 128
"""Rows that are decoded at once."""


class Answer(NamedTuple):
    """One answer.

    Attributes:
        ids: Its tokens.
        cut: Whether it ended at a token that the other model, which its edit needs, does not have.
    """

    ids: list[int]
    cut: bool


def answer_edited(
    module: DiffModule,
    mine: Side,
    other: Side,
    indices: Sequence[int],
    cells: Sequence[Handle],
    translate: Tensor,
    most: Reach,
    stops: Sequence[int],
) -> list[Answer]:
    """Answer prompts greedily, each under an edit of its own that acts on every token from the last on.

    Args:
        module: The fitted subspaces.
        mine: The model that is edited, with prefixes.
        other: The other one.
        indices: The prompts; one may occur several times.
        cells: The edit of each, all at one site.
        translate: The other model's id of each of its tokens, −1 where it has none.
        most: Longest answer.
        stops: Tokens that end it.
    """
    found: dict[int, Answer] = {}
    for needs in (False, True):
        rows = [i for i, cell in enumerate(cells) if (cell.kind in NEEDS_DONOR) == needs]
        by_prompt: dict[int, list[int]] = {}
        for i in rows:
            by_prompt.setdefault(indices[i], []).append(i)
        for batch in batches(mine, other, (indices[i] for i in rows)):
            here = [by_prompt[index].pop(0) for index in batch]
            follower = Follower(continued(other, batch), cells[0].site, translate) if needs else None
            edits = _Edits(module, [cells[i] for i in here])
            said = decode(continued(mine, batch), most, stops, edits, follower)
            found |= {i: Answer(ids, cut) for i, ids, cut in zip(here, said.answers, said.cut, strict=True)}
    return [found[i] for i in range(len(indices))]


class _Edits:
    """Edits of a batch, one for each row."""

    def __init__(self, module: DiffModule, cells: Sequence[Handle]) -> None:
        self.module, self.cells = module, cells

    def __call__(self, donor: Tensor | None, numbers: Sequence[int]) -> Mapping[Site, Edit]:
        cells = [self.cells[i] for i in numbers]

        def edit(activation: Tensor, _positions: Tensor) -> Tensor:
            changed = activation.clone()
            for cell in dict.fromkeys(cells):
                rows = torch.tensor([c == cell for c in cells], device=activation.device)
                theirs = None if donor is None else donor[rows].to(activation)
                changed[rows] = cell.change(self.module, activation[rows], theirs)
            return changed

        return {self.cells[0].site: edit}


def batches(mine: Side, other: Side, indices: Iterable[int]) -> Iterator[list[int]]:
    """Group prompts, by length, that can be decoded together; one may occur several times.

    Args:
        mine: The model that answers, with prefixes.
        other: The other one, with prefixes.
        indices: The prompts.
    """
    lengths = [len(e) for e in mine.encoded]
    order = sorted(indices, key=lambda i: (lengths[i], i))
    if padded_together([*mine.prefixes[:1], *other.prefixes[:1]]):
        yield from (order[i : i + ROWS] for i in range(0, len(order), ROWS))
    else:
        yield from ([*same] for _, same in groupby(order))


def continued(side: Side, indices: Sequence[int]) -> Rows:
    """Return rows that continue some prompts of a side."""
    last = [side.encoded[i].input_ids[-1] for i in indices]
    return Rows(side.loaded.model, [side.prefixes[i] for i in indices], last)
