"""What the edited model answers to neutral prompts as it is, as both models read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechdiff.callbacks.edited_answers import batches, continued
from mechdiff.callbacks.handle_evaluation import same_end, two_sides
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.states import read_last
from mechdiff.data.prompts import Prompt
from mechdiff.interventions.generation import Reach
from mechdiff.interventions.hooks import record, stop_after
from mechdiff.interventions.lockstep import decode
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.pairs.loading import LoadedPair


class Read(NamedTuple):
    """An answer as both models have read it, from the last token of its prompt on.

    Attributes:
        tokens: What the edited model reads, `(T,)`.
        answer: What follows each of them, `(m,)`; m is T, or T − 1 where the answer had ended.
        own: Its states by site, `(T, d)`.
        donor: The other model's, `(t, d)`; t is less than T where it does not have a token of the answer.
    """

    tokens: Tensor
    answer: Tensor
    own: dict[Site, Tensor]
    donor: dict[Site, Tensor]

    @property
    def heard(self) -> int:
        """Tokens that the other model can read too."""
        return len(next(iter(self.donor.values())))

    def shared(self) -> Read:
        """Return what the other model can follow."""
        t = self.heard
        return Read(self.tokens[:t], self.answer[:t], {s: h[:t] for s, h in self.own.items()}, self.donor)


def neutral_sides(
    pair: LoadedPair, engines: tuple[SuffixEngine, SuffixEngine], prompts: Sequence[Prompt]
) -> tuple[Side, Side]:
    """Let base and tuned read neutral prompts; those that end at another place for the two are left out."""
    same = same_end(*two_sides(pair, prompts, engines))
    sides = two_sides(pair, [p for p, able in zip(prompts, same, strict=True) if able], engines)
    for side in sides:
        read_last(side, [])
    return sides


def read_answers(
    mine: Side, other: Side, sites: Sequence[Site], translate: Tensor, most: Reach, stops: Sequence[int]
) -> dict[int, Read]:
    """Let the edited model answer, and both read the answers, as far as the other one can; by prompt.

    Args:
        mine: The model that is edited, with prefixes.
        other: The other one.
        sites: Where states are kept.
        translate: The other model's id of each of its tokens, −1 where it has none.
        most: Longest answer.
        stops: Tokens that end it.
    """
    found: dict[int, Read] = {}
    for batch in batches(mine, other, range(len(mine.encoded))):
        own_rows, other_rows = (continued(side, batch) for side in (mine, other))
        said = decode(own_rows, most, stops, sites=sites)
        known = [_known(ids, translate) for ids in said.answers]
        theirs = [[int(i) for i in translate[ids]] if ids else [] for ids in known]
        follow = pad_sequence([torch.tensor(ids) for ids in theirs], batch_first=True).long()
        with (
            record(other.loaded.model, sites) as seen,
            stop_after(other.loaded.model, max(site.layer for site in sites)),
        ):
            other_rows.step(torch.cat([other_rows.last, follow.to(other_rows.last)], 1))
        for row, (index, ids) in enumerate(zip(batch, said.answers, strict=True)):
            if ids:
                length = len(ids) + said.ended[row]  # one token more tells if it still does
                answer = torch.tensor(ids, device=own_rows.last.device)
                tokens = torch.cat([own_rows.last[row], answer])[:length]
                own = {site: said.states[site][row, :length] for site in sites}
                heard = length if len(known[row]) == len(ids) else len(known[row])
                donor = {site: seen[site][row, :heard].clone() for site in sites}
                found[index] = Read(tokens, answer, own, donor)
    return found


def _known(ids: Sequence[int], translate: Tensor) -> list[int]:
    """Cut an answer before the first token that the other model does not have."""
    known = [bool(translate[i] >= 0) for i in ids]
    return list(ids[: known.index(False)] if False in known else ids)
