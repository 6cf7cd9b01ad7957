"""What an edit costs on neutral prompts, for many edits at once, and the choice of strength within bounds.

1. The edited model answers neutral prompts greedily, once, as it is. Both models read those answers; what is
   above the site is run again with an edit on the last token of the prompt and on every token of the answer,
   and all edits of a prompt are rows of one batch.
2. Fluency is the ratio of the answers' nats. Where every token of an answer is still the most probable one,
   greedy decoding would say the same answer again: such a prompt does not turn, and nothing is generated.
   Only the others are decoded with the edit on.
3. For each kind and rank the strength with the largest effect is tried first, on a few prompts, then on all;
   the first one whose one-sided bounds hold is chosen. Strengths above one that fails are not tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.handle_evaluation import Handle, same_end, two_sides
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.side_effects import (
    MAX_BPB,
    MAX_PP,
    ONE_SIDED,
    fluency_record,
    turned,
    turned_record,
)
from mechdiff.callbacks.states import read_last
from mechdiff.callbacks.sweep_effects import NEEDS_DONOR
from mechdiff.data.prompts import Prompt
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import bootstrap_ratio, generator
from mechdiff.interventions.generation import generate, stop_tokens
from mechdiff.interventions.hooks import Edit, record
from mechdiff.interventions.lockstep import Start, decode_together
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.loading import LoadedPair
from mechdiff.results import Record

SCREEN = 32
"""Prompts on which an edit is tried first."""


@dataclass
class _Read:
    """An answer as both models have read it, from the last token of its prompt on.

    Attributes:
        tokens: What the edited model reads, `(T,)`.
        answer: What follows each of them, `(m,)`; m is T, or T − 1 where the answer had ended.
        own: Its states by site, `(T, d)`.
        donor: The other model's.
        nats: How improbable it finds the answer as it is.
    """

    tokens: Tensor
    answer: Tensor
    own: dict[Site, Tensor]
    donor: dict[Site, Tensor]
    nats: float


@dataclass
class Cost:
    """What one edit costs.

    Attributes:
        nats: Of each answer with the edit, `(prompts,)`.
        turned: Whether each prompt's answer turns; None where fluency had failed already.
    """

    nats: Tensor
    turned: list[bool] | None = None


@dataclass
class Neutral:
    """Neutral prompts of one split in the model that is edited, and in the other.

    Attributes:
        module: The fitted subspaces.
        mine: The model that is edited, with prefixes.
        other: The other one.
        sites: Where edits act.
        domain: What counts as turned; see `turned`.
        translate: The other model's id of each of its tokens, −1 where it has none.
        most: Longest answer.
        kept: Prompts with an answer, by index.
        reads: Their answers.
        before: Whether each answer is of the tuned kind without any edit.
    """

    module: DiffModule
    mine: Side
    other: Side
    sites: Sequence[Site]
    domain: str
    translate: Tensor
    most: int
    seed: int
    kept: list[int] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)
    before: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = self.mine.loaded.model
        self.stops = stop_tokens(model, self.mine.loaded.tokenizer.eos_token_id)
        said = generate(model, [e.input_ids for e in self.mine.encoded], self.most, self.stops)
        for index, ids in enumerate(said):
            known = [bool(self.translate[i] >= 0) for i in ids]
            ids = ids[: known.index(False)] if False in known else ids
            if ids:
                self.kept.append(index)
                self.reads.append(self._read(index, ids))
                self.before.append(turned(self._text(ids), self.domain))

    def _read(self, index: int, ids: Sequence[int]) -> _Read:
        last, theirs = self.mine.ids(index)[0, -1:], self.other.ids(index)[0, -1:]
        answer = torch.tensor(ids, device=last.device)
        length = len(ids) + (len(ids) < self.most)  # one more token tells whether it still ends there
        tokens = torch.cat([last, answer])[:length]
        follow = torch.cat([theirs, self.translate[answer].to(theirs)])[:length]
        states = []
        for side, read in ((self.mine, tokens), (self.other, follow)):
            with record(side.loaded.model, self.sites) as seen:
                at = torch.arange(length)[None]
                logits = run_logits(side.loaded.model, read[None], None, at, side.prefixes[index])
            states.append({site: seen[site][0] for site in self.sites})
            if side is self.mine:
                nats = float(_nats(logits, answer)[0])
        return _Read(tokens, answer, *states, nats)

    @property
    def plain(self) -> Tensor:
        """Nats of the answers without an edit, float64, `(prompts,)`."""
        return torch.tensor([read.nats for read in self.reads], dtype=torch.float64)

    def score(self, cells: Sequence[Handle], rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Score the answers of some prompts with each edit of one site.

        Args:
            cells: The edits.
            rows: Numbers of the prompts among those kept.

        Returns:
            Nats, float64, and whether the answer stays the same; `(prompts, edits)`.
        """
        nats, same = [], []
        site = cells[0].site
        for row in rows:
            read = self.reads[row]
            own, donor = read.own[site], read.donor[site].to(read.own[site])
            hidden = torch.stack([cell.change(self.module, own, donor) for cell in cells])
            tokens = read.tokens.expand(len(cells), -1)
            at = torch.arange(len(read.tokens)).expand(len(cells), -1)
            logits = self.mine.engine.resume(
                site.layer, hidden, tokens, prefix=self.mine.prefixes[self.kept[row]], logits_at=at
            )
            nats.append(_nats(logits, read.answer))
            best, m = logits.argmax(-1), len(read.answer)
            alike = (best[:, :m] == read.answer).all(1)
            if len(read.tokens) > m:
                alike &= torch.isin(best[:, m], torch.tensor(self.stops, device=best.device))
            same.append(alike.cpu())
        return torch.stack(nats), torch.stack(same)

    def turns(self, cells: Sequence[Handle], same: Tensor) -> list[list[bool]]:
        """Tell of every prompt whether its answer turns under each edit of one site.

        Args:
            cells: The edits.
            same: Whether the answer stays, `(prompts, edits)`.
        """
        found = [list(self.before) for _ in cells]
        for row, stays in enumerate(same.tolist()):
            changed = [i for i, kept in enumerate(stays) if not kept]
            for i, text in zip(changed, self.answers([cells[i] for i in changed], row), strict=True):
                found[i][row] = turned(text, self.domain)
        return found

    def answers(self, cells: Sequence[Handle], row: int) -> list[str]:
        """Answer a prompt with each edit of one site on."""
        if not cells:
            return []
        said = answer_edited(
            self.module, self.mine, self.other, self.kept[row], cells, self.translate, self.most, self.stops
        )
        return [self._text(ids) for ids in said]

    def records(self, cell: Handle, cost: Cost, about: Mapping[str, Any]) -> list[Record]:
        """Return what an edit costs."""
        n = len(cost.nats)
        draws = generator(self.seed, "side_effect_bpb")
        found = [fluency_record(cost.nats, self.plain[:n], draws, dict(about))]
        if cost.turned is not None:
            found.append(turned_record(cost.turned, self.before, dict(about)))
        return found

    def costs(self, cells: Sequence[Handle]) -> list[Cost]:
        """Measure edits of one site on all prompts."""
        nats, same = self.score(cells, range(len(self.reads)))
        return [
            Cost(column, turns) for column, turns in zip(nats.unbind(1), self.turns(cells, same), strict=True)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.mine.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def bound(self, nats: Tensor) -> tuple[float, float]:
        """Return the one-sided bounds, from below and above, of how many more nats answers take, a share."""
        draws = generator(self.seed, "side_effect_bpb")
        found = bootstrap_ratio(nats, self.plain[: len(nats)], generator=draws, level=ONE_SIDED)
        return found.low - 1, found.high - 1

    def choose(self, queues: Mapping[Any, Sequence[Handle]]) -> tuple[dict[Any, Handle], dict[Handle, Cost]]:
        """Choose in each queue the first edit that costs little enough.

        Args:
            queues: Edits of one site, the most wanted first.

        Returns:
            The chosen ones by queue, and what every edit that was tried costs.
        """
        left = {key: list(cells) for key, cells in queues.items() if cells}
        chosen: dict[Any, Handle] = {}
        tried: dict[Handle, Cost] = {}
        few = range(min(SCREEN, len(self.reads)))
        rest = range(len(few), len(self.reads))
        while left:
            front = {key: cells[0] for key, cells in left.items()}
            cells = list(front.values())
            nats, same = self.score(cells, few)
            hopeful = [i for i in range(len(cells)) if self.bound(nats[:, i])[0] <= MAX_BPB]
            tried |= {cell: Cost(nats[:, i]) for i, cell in enumerate(cells) if i not in hopeful}
            if hopeful and len(rest):
                more = self.score([cells[i] for i in hopeful], rest)
                nats, same = (torch.cat([a[:, hopeful], b]) for a, b in zip((nats, same), more, strict=True))
            elif hopeful:
                nats, same = nats[:, hopeful], same[:, hopeful]
            fluent = []
            for column, i in enumerate(hopeful):
                tried[cells[i]] = Cost(nats[:, column])
                if self.bound(nats[:, column])[1] <= MAX_BPB:
                    fluent.append(column)
            passing = [cells[hopeful[column]] for column in fluent]
            for cell, turns in zip(passing, self.turns(passing, same[:, fluent]), strict=True):
                tried[cell] = replace(tried[cell], turned=turns)
            for key, cell in front.items():
                if cell in passing and self._turns_little(tried[cell]):
                    chosen[key] = cell
                    del left[key]
                    continue
                left[key] = [c for c in left[key][1:] if c.alpha < cell.alpha]
                if not left[key]:
                    del left[key]
        return chosen, tried

    def _turns_little(self, cost: Cost) -> bool:
        assert cost.turned is not None
        changed = sum(a and not b for a, b in zip(cost.turned, self.before, strict=True))
        return 100 * binomial_interval(changed, len(self.before), side="upper").high <= MAX_PP


def neutral_sides(
    pair: LoadedPair, engines: tuple[SuffixEngine, SuffixEngine], prompts: Sequence[Prompt]
) -> tuple[Side, Side]:
    """Let base and tuned read neutral prompts; those that end at another place for the two are left out."""
    same = same_end(*two_sides(pair, prompts, engines))
    sides = two_sides(pair, [p for p, able in zip(prompts, same, strict=True) if able], engines)
    for side in sides:
        read_last(side, [])
    return sides


def answer_edited(
    module: DiffModule,
    mine: Side,
    other: Side,
    index: int,
    cells: Sequence[Handle],
    translate: Tensor,
    most: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """Answer one prompt greedily under each edit of one site, which acts on every token from the last on.

    Args:
        module: The fitted subspaces.
        mine: The model that is edited, with prefixes.
        other: The other one.
        index: The prompt.
        cells: The edits.
        translate: The other model's id of each of its tokens, −1 where it has none.
        most: Longest answer.
        stops: Tokens that end it.
    """
    site = cells[0].site
    needed = any(cell.kind in NEEDS_DONOR for cell in cells)

    def edits(donor: Tensor | None) -> Mapping[Site, Edit]:
        def edit(activation: Tensor, _positions: Tensor) -> Tensor:
            rows = [
                cell.change(module, activation[i : i + 1], donor[i : i + 1] if donor is not None else None)
                for i, cell in enumerate(cells)
            ]
            return torch.cat(rows)

        return {site: edit}

    start, follower = (
        Start(side.loaded.model, side.prefixes[index], side.encoded[index].input_ids[-1])
        for side in (mine, other)
    )
    more = {"follower": follower, "site": site, "translate": translate} if needed else {}
    return decode_together(start, len(cells), most, edits, stops, **more)


def _nats(logits: Tensor, answer: Tensor) -> Tensor:
    """Return how improbable an answer is under logits `(rows, T, vocabulary)`, float64, `(rows,)`."""
    logits = logits[:, : len(answer)].to(torch.promote_types(logits.dtype, torch.float32))
    picked = logits.gather(-1, answer.to(logits.device).expand(len(logits), -1)[..., None])[..., 0]
    return -(picked - logits.logsumexp(-1)).double().sum(1).cpu()
