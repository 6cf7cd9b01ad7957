"""Answer prompts that have been read already, with an edit on the last token and on every token said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mechdiff.callbacks.handle_evaluation import Handle
from mechdiff.callbacks.patcher import Side
from mechdiff.interventions.hooks import Edit
from mechdiff.interventions.lockstep import Follower, Rows, decode
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import DiffModule

NEEDS_DONOR = ("interchange", "reverse")
"""Edits that need the other model's state at every token."""


def answer_edited(
    module: DiffModule,
    mine: Side,
    other: Side,
    indices: Sequence[int],
    cells: Sequence[Handle],
    translate: Tensor,
    most: int,
    stops: Sequence[int],
) -> list[list[int]]:
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
    site = cells[0].site

    def edits(donor: Tensor | None) -> Mapping[Site, Edit]:
        def edit(activation: Tensor, _positions: Tensor) -> Tensor:
            changed = activation.clone()
            for cell in dict.fromkeys(cells):
                rows = torch.tensor([c == cell for c in cells], device=activation.device)
                theirs = None if donor is None else donor[rows].to(activation)
                changed[rows] = cell.change(module, activation[rows], theirs)
            return changed

        return {site: edit}

    follower = None
    if any(cell.kind in NEEDS_DONOR for cell in cells):
        follower = Follower(continued(other, indices), site, translate)
    return decode(continued(mine, indices), most, stops, edits, follower).answers


def continued(side: Side, indices: Sequence[int]) -> Rows:
    """Return rows that continue some prompts of a side."""
    last = [side.encoded[i].input_ids[-1] for i in indices]
    return Rows(side.loaded.model, [side.prefixes[i] for i in indices], last)
