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

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechdiff.callbacks.edited_answers import NEEDS_DONOR, answer_edited, continued
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
from mechdiff.data.prompts import Prompt
from mechdiff.errors import PromptError
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import bootstrap_ratio, generator
from mechdiff.interventions.generation import stop_tokens
from mechdiff.interventions.hooks import record, stop_after
from mechdiff.interventions.lockstep import decode, padded_together
from mechdiff.interventions.sites import Site
from mechdiff.interventions.suffix import SuffixEngine
from mechdiff.modules.base import DiffModule
from mechdiff.pairs.loading import LoadedPair
from mechdiff.results import Record

SCREEN = 32
"""Prompts on which an edit is tried first."""


ROWS = 32
"""Rows that are decoded at once."""


class _Read(NamedTuple):
    """An answer as both models have read it, from the last token of its prompt on.

    Attributes:
        tokens: What the edited model reads, `(T,)`.
        answer: What follows each of them, `(m,)`; m is T, or T − 1 where the answer had ended.
        own: Its states by site, `(T, d)`.
        donor: The other model's.
    """

    tokens: Tensor
    answer: Tensor
    own: dict[Site, Tensor]
    donor: dict[Site, Tensor]


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
        plain: Nats of each answer without an edit, float64; NaN until it is scored.
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
        self.stops = stop_tokens(self.mine.loaded.model, self.mine.loaded.tokenizer.eos_token_id)
        found: dict[int, _Read] = {}
        for batch in self._batches(range(len(self.mine.encoded))):
            mine, other = (continued(side, batch) for side in (self.mine, self.other))
            said, states = decode(mine, self.most, self.stops, sites=self.sites)
            answers = [self._known(ids) for ids in said]
            theirs = [[int(i) for i in self.translate[ids]] if ids else [] for ids in answers]
            follow = pad_sequence([torch.tensor(ids) for ids in theirs], batch_first=True).long()
            model, last = self.other.loaded.model, max(site.layer for site in self.sites)
            with record(model, self.sites) as seen, stop_after(model, last):
                other.step(torch.cat([other.last, follow.to(other.last)], 1))
            for row, (index, ids) in enumerate(zip(batch, answers, strict=True)):
                if ids:
                    ended = len(ids) == len(said[row]) < self.most  # one token more tells if it still does
                    answer = torch.tensor(ids, device=mine.last.device)
                    length = len(ids) + ended
                    tokens = torch.cat([mine.last[row], answer])[:length]
                    own = {site: states[site][row, :length] for site in self.sites}
                    donor = {site: seen[site][row, :length].clone() for site in self.sites}
                    found[index] = _Read(tokens, answer, own, donor)
        for index, read in sorted(found.items()):
            self.kept.append(index)
            self.reads.append(read)
            self.before.append(turned(self._text(read.answer.tolist()), self.domain))
        if not self.reads:
            raise PromptError(
                f"{self.mine.loaded.role} answers no neutral prompt; allowed: one or more (key: pair.prompts)"
            )
        self.plain = torch.full((len(self.reads),), torch.nan, dtype=torch.float64)

    def _known(self, ids: Sequence[int]) -> list[int]:
        """Cut an answer before the first token that the other model does not have."""
        known = [bool(self.translate[i] >= 0) for i in ids]
        return list(ids[: known.index(False)] if False in known else ids)

    def _batches(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """Group prompts, by length, that can be decoded together; one may occur several times."""
        lengths = [len(e) for e in self.mine.encoded]
        order = sorted(indices, key=lambda i: (lengths[i], i))
        if padded_together([*self.mine.prefixes[:1], *self.other.prefixes[:1]]):
            yield from (order[i : i + ROWS] for i in range(0, len(order), ROWS))
        else:
            yield from ([*same] for _, same in groupby(order))

    def score(self, cells: Sequence[Handle], rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Score the answers of some prompts with each edit of one site.

        Args:
            cells: The edits.
            rows: Numbers of the prompts among those kept.

        Returns:
            Nats, float64, and how many tokens of the answer stay the most probable ones, one more where it
            still ends; `(prompts, edits)`.
        """
        nats, stay = [], []
        site = cells[0].site
        for row in rows:
            read = self.reads[row]
            own, donor = read.own[site], read.donor[site].to(read.own[site])
            hidden = torch.stack([own, *(cell.change(self.module, own, donor) for cell in cells)])
            tokens = read.tokens.expand(len(hidden), -1)
            at = torch.arange(len(read.tokens)).expand(len(hidden), -1)
            logits = self.mine.engine.resume(
                site.layer, hidden, tokens, prefix=self.mine.prefixes[self.kept[row]], logits_at=at
            )
            plain, *found = _nats(logits, read.answer)
            if self.plain[row].isnan():
                self.plain[row] = plain
            nats.append(torch.stack(found))
            best, m = logits[1:].argmax(-1), len(read.answer)
            alike = best[:, :m] == read.answer
            if len(read.tokens) > m:
                ends = torch.isin(best[:, m:], torch.tensor(self.stops, device=best.device))
                alike = torch.cat([alike, ends], 1)
            stay.append(alike.long().cumprod(1).sum(1).cpu())
        return torch.stack(nats), torch.stack(stay)

    def turns(self, cells: Sequence[Handle], stay: Tensor) -> list[list[bool]]:
        """Tell of every prompt whether its answer turns under each edit of one site.

        Args:
            cells: The edits.
            stay: How many tokens stay; see `score`.
        """
        found = [list(self.before) for _ in cells]
        open_cells = [
            (row, i)
            for row, read in enumerate(self.reads)
            for i, length in enumerate(stay[row].tolist())
            if length < len(read.tokens) and not self._settled(read.answer[:length])
        ]
        for kind_needs in (False, True):
            wanted = [(r, i) for r, i in open_cells if (cells[i].kind in NEEDS_DONOR) == kind_needs]
            for (row, i), text in self.answers(cells, wanted):
                found[i][row] = turned(text, self.domain)
        return found

    def answers(
        self, cells: Sequence[Handle], wanted: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], str]]:
        """Yield answers with edits of one site on, for numbers of prompts and of edits."""
        by_prompt: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for row, i in wanted:
            by_prompt[self.kept[row]].append((row, i))
        for batch in self._batches(self.kept[row] for row, _ in wanted):
            pairs = [by_prompt[index].pop(0) for index in batch]
            each = [cells[i] for _, i in pairs]
            said = answer_edited(
                self.module, self.mine, self.other, batch, each, self.translate, self.most, self.stops
            )
            yield from zip(pairs, map(self._text, said), strict=True)

    def _settled(self, begins: Tensor) -> bool:
        """Tell whether an answer that begins so cannot turn: a number has no letters."""
        return self.domain == "cognitive" and any(c.isalpha() for c in self._text(begins.tolist()))

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
        nats, stay = self.score(cells, range(len(self.reads)))
        return [
            Cost(column, turns) for column, turns in zip(nats.unbind(1), self.turns(cells, stay), strict=True)
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
            nats, stay = self.score(cells, few)
            hopeful = [i for i in range(len(cells)) if self.bound(nats[:, i])[0] <= MAX_BPB]
            tried |= {cell: Cost(nats[:, i]) for i, cell in enumerate(cells) if i not in hopeful}
            if hopeful and len(rest):
                more = self.score([cells[i] for i in hopeful], rest)
                nats, stay = (torch.cat([a[:, hopeful], b]) for a, b in zip((nats, stay), more, strict=True))
            elif hopeful:
                nats, stay = nats[:, hopeful], stay[:, hopeful]
            fluent = []
            for column, i in enumerate(hopeful):
                tried[cells[i]] = Cost(nats[:, column])
                if self.bound(nats[:, column])[1] <= MAX_BPB:
                    fluent.append(column)
            passing = [cells[hopeful[column]] for column in fluent]
            for cell, turns in zip(passing, self.turns(passing, stay[:, fluent]), strict=True):
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


def _nats(logits: Tensor, answer: Tensor) -> Tensor:
    """Return how improbable an answer is under logits `(rows, T, vocabulary)`, float64, `(rows,)`."""
    logits = logits[:, : len(answer)].to(torch.promote_types(logits.dtype, torch.float32))
    picked = logits.gather(-1, answer.to(logits.device).expand(len(logits), -1)[..., None])[..., 0]
    return -(picked - logits.logsumexp(-1)).double().sum(1).cpu()
