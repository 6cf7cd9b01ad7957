"""What an edit costs on neutral prompts, for many edits at once, and the choice of strength within bounds.

1. The edited model answers neutral prompts greedily, once, as it is. Both models read those answers; what is
   above the site is run again with an edit on the last token of the prompt and on every token of the answer,
   and all edits of a prompt are rows of one batch.
2. Fluency is the ratio of the answers' nats. Where every token of an answer is still the most probable one,
   greedy decoding would say the same answer again: such a prompt does not turn, and nothing is generated.
   Only the others are decoded with the edit on.
   For edits that need the other model, answers are cut before the first token that it does not have.
3. For each kind and rank the strength with the largest effect is tried first, on a few prompts, then on all;
   the first one whose one-sided bounds hold is chosen. Strengths above one that fails are not tried, and no
   further prompt is answered once so many have turned that the bound cannot hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.edited_answers import NEEDS_DONOR, answer_edited
from mechdiff.callbacks.handle_evaluation import Handle
from mechdiff.callbacks.neutral_answers import Read, read_answers
from mechdiff.callbacks.patcher import Side
from mechdiff.callbacks.side_effects import (
    MAX_BPB,
    MAX_PP,
    ONE_SIDED,
    answer_reach,
    fluency_record,
    turned,
    turned_record,
)
from mechdiff.errors import PromptError
from mechdiff.functional.metrics import token_logprobs
from mechdiff.functional.proportions import binomial_interval
from mechdiff.functional.stats import bootstrap_ratio, generator
from mechdiff.interventions.generation import stop_tokens
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import DiffModule
from mechdiff.results import Record

SCREENS = (8, 32)
"""Numbers of prompts after which an edit that very likely costs too much is given up."""
UNLIKELY = 0.98
"""Coverage of the two-sided interval whose lower end, one-sided 99 %, must hold the bound until then."""
TOKENS = 1024
"""Tokens of answers that are scored at once, over all edits."""


@dataclass
class Cost:
    """What one edit costs.

    Attributes:
        nats: Of each answer with the edit, `(prompts,)`.
        turned: Whether each prompt's answer turns, of the first ones alone where these are too many already;
            None where fluency had failed, or it was not asked for.
        cut: How many answers with the edit end where the other model cannot follow.
    """

    nats: Tensor
    turned: list[bool] | None = None
    cut: int = 0


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
        chars: Longest answer, in characters.
        seed: Of resampling.
        kept: Prompts with an answer, in an order drawn by the seed: the first few stand for all.
        reads: Their answers.
        before: Whether each answer is of the tuned kind without any edit.
        plain: Nats of each answer without an edit, whole and as far as the other model can follow, float64,
            `(2, prompts)`; NaN until it is scored.
    """

    module: DiffModule
    mine: Side
    other: Side
    sites: Sequence[Site]
    domain: str
    translate: Tensor
    chars: int
    seed: int
    kept: list[int] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    before: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stops = stop_tokens(self.mine.loaded.model, self.mine.loaded.tokenizer.eos_token_id)
        self.reach = answer_reach(self.mine.loaded, self.chars)
        found = read_answers(self.mine, self.other, self.sites, self.translate, self.reach, self.stops)
        order, draws = sorted(found), generator(self.seed, "neutral")
        for index in (order[i] for i in torch.randperm(len(order), generator=draws).tolist()):
            read = found[index]
            self.kept.append(index)
            self.reads.append(read)
            self.before.append(turned(self._text(read.answer.tolist()), self.domain))
        if not self.reads:
            raise PromptError(
                f"{self.mine.loaded.role} answers no neutral prompt; allowed: one or more (key: pair.prompts)"
            )
        self.heard = torch.tensor([read.heard for read in self.reads])
        self.plain = torch.full((2, len(self.reads)), torch.nan, dtype=torch.float64)

    def score(self, cells: Sequence[Handle], rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Score the answers of some prompts with each edit of one site.

        Args:
            cells: The edits.
            rows: Numbers of the prompts among those kept.

        Returns:
            Nats, float64, and how many tokens of the answer stay the most probable ones, one more where it
            still ends; `(prompts, edits)`.
        """
        numbers = list(rows)
        nats = torch.zeros(len(numbers), len(cells), dtype=torch.float64)
        stay = torch.zeros(len(numbers), len(cells), dtype=torch.long)
        for needs in (False, True):
            columns = [i for i, cell in enumerate(cells) if (cell.kind in NEEDS_DONOR) == needs]
            for place, row in enumerate(numbers if columns else ()):
                read = self.reads[row].shared() if needs else self.reads[row]
                if len(read.tokens):
                    found = self._score([cells[i] for i in columns], row, read, int(needs))
                    nats[place, columns], stay[place, columns] = found
                else:
                    self.plain[1, row] = 0.0
        return nats, stay

    def _score(self, cells: Sequence[Handle], row: int, read: Read, which: int) -> tuple[Tensor, Tensor]:
        site = cells[0].site
        own = read.own[site]
        donor = read.donor[site].to(own) if which else None
        tokens, m = read.tokens[None], len(read.answer)
        nats, stay = [], []
        known = not self.plain[which, row].isnan()
        rows: list[Handle | None] = [*cells] if known else [None, *cells]
        size = max(1, TOKENS // len(read.tokens))
        for some in (rows[i : i + size] for i in range(0, len(rows), size)):
            hidden = torch.stack([own if c is None else c.change(self.module, own, donor) for c in some])
            at = torch.arange(len(read.tokens)).expand(len(hidden), -1)
            logits = self.mine.engine.resume(
                site.layer,
                hidden,
                tokens.expand(len(hidden), -1),
                prefix=self.mine.prefixes[self.kept[row]],
                logits_at=at,
            )
            follow = read.answer.expand(len(logits), -1)
            nats.append(-token_logprobs(logits[:, :m], follow).double().sum(1).cpu())
            best = logits.argmax(-1)
            alike = best[:, :m] == read.answer
            if len(read.tokens) > m:
                ends = torch.isin(best[:, m:], torch.tensor(self.stops, device=best.device))
                alike = torch.cat([alike, ends], 1)
            stay.append(alike.long().cumprod(1).sum(1).cpu())
        found, stays = torch.cat(nats), torch.cat(stay)
        if not known:
            self.plain[which, row] = found[0]
        return found[-len(cells) :], stays[-len(cells) :]

    def turns(
        self, cells: Sequence[Handle], stay: Tensor, first: int | None = None
    ) -> list[tuple[list[bool], int]]:
        """Tell of every prompt whether its answer turns under each edit of one site, and how many were cut.

        Args:
            cells: The edits.
            stay: How many tokens stay; see `score`.
            first: Prompts after which edits that cannot hold the bound any more are left; None reads all.
        """
        found: list[list[bool]] = [[] for _ in cells]
        cut, left = [0] * len(cells), list(range(len(cells)))
        most = len(self.reads)
        size = most if first is None else min(first, most)
        for rows in (range(size), range(size, most)):
            wanted = []
            for i in left:
                found[i] += [self.before[row] for row in rows]
            for row, i in ((row, i) for row in rows for i in left):
                read, length = self.reads[row], int(stay[row, i])
                needs = cells[i].kind in NEEDS_DONOR
                if needs and length == read.heard < len(read.tokens):
                    cut[i] += 1  # the same answer as far as the other model can follow
                elif length < (read.heard if needs else len(read.tokens)) and not self._settled(
                    read.answer[:length]
                ):
                    wanted.append((row, i))
            said = answer_edited(
                self.module,
                self.mine,
                self.other,
                [self.kept[row] for row, _ in wanted],
                [cells[i] for _, i in wanted],
                self.translate,
                self.reach,
                self.stops,
            )
            for (row, i), answer in zip(wanted, said, strict=True):
                found[i][row] = turned(self._text(answer.ids), self.domain)
                cut[i] += answer.cut
            left = [i for i in left if not self._turns_much(cells[i], found[i])]
        return list(zip(found, cut, strict=True))

    def _settled(self, begins: Tensor) -> bool:
        """Tell whether an answer that begins so cannot turn: a number has no letters."""
        return self.domain == "cognitive" and any(c.isalpha() for c in self._text(begins.tolist()))

    def _read_by(self, cell: Handle, n: int | None = None) -> Tensor:
        """Return numbers of the first n prompts whose answer an edit acts on at all."""
        heard = self.heard[:n]
        return (heard > 0).nonzero()[:, 0] if cell.kind in NEEDS_DONOR else torch.arange(len(heard))

    def records(self, cell: Handle, cost: Cost, about: Mapping[str, Any]) -> list[Record]:
        """Return what an edit costs; of edits that need the other model, also what it could not follow."""
        about = dict(about)
        rows, n = self._read_by(cell, len(cost.nats)), len(cost.nats)
        if cell.kind in NEEDS_DONOR:
            short = sum(read.heard < len(read.tokens) for read in self.reads[:n])
            if short or cost.cut:
                about["flags"] = (*about.get("flags", ()), "cut_answers")
            counts = {"dropped": n - len(rows), "cut": short - (n - len(rows)), "cut_edited": cost.cut}
            about["params"] = {**about.get("params", {}), **counts}
        draws = generator(self.seed, "side_effect_bpb")
        plain = self.plain[self._which(cell)]
        found = [fluency_record(cost.nats[rows], plain[rows], draws, dict(about))]
        if cost.turned is not None:
            read = [i for i in rows.tolist() if i < len(cost.turned)]
            after, before = ([part[i] for i in read] for part in (cost.turned, self.before))
            found.append(turned_record(after, before, dict(about)))
        return found

    def _which(self, cell: Handle) -> int:
        return int(cell.kind in NEEDS_DONOR)

    def costs(self, cells: Sequence[Handle], answered: Collection[Handle]) -> list[Cost]:
        """Measure edits of one site on all prompts.

        Args:
            cells: The edits.
            answered: Those among them whose answers are generated where they may differ.
        """
        nats, stay = self.score(cells, range(len(self.reads)))
        found = {cell: Cost(column) for cell, column in zip(cells, nats.unbind(1), strict=True)}
        some = [i for i, cell in enumerate(cells) if cell in answered]
        for i, (after, cut) in zip(some, self.turns([cells[i] for i in some], stay[:, some]), strict=True):
            found[cells[i]] = replace(found[cells[i]], turned=after, cut=cut)
        return [found[cell] for cell in cells]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.mine.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def bound(self, cell: Handle, nats: Tensor, level: float = ONE_SIDED) -> tuple[float, float]:
        """Return the one-sided bounds, from below and above, of how many more nats answers take, a share."""
        draws, rows = generator(self.seed, "side_effect_bpb"), self._read_by(cell, len(nats))
        if not len(rows):
            return 0.0, float("inf")
        plain = self.plain[self._which(cell), rows]
        found = bootstrap_ratio(nats[rows], plain, generator=draws, level=level)
        return found.low - 1, found.high - 1

    def choose(self, queues: Mapping[Any, Sequence[Handle]]) -> tuple[dict[Any, Handle], dict[Handle, Cost]]:
        """Choose in each queue the first edit that costs little enough.

        Answers are decoded for all queues together, once each has come down to a fluent edit: the steps of
        decoding take their time for one row as for many.

        Args:
            queues: Edits of one site, the most wanted first.

        Returns:
            The chosen ones by queue, and what every edit that was tried costs.
        """
        left = {key: list(cells) for key, cells in queues.items() if cells}
        chosen: dict[Any, Handle] = {}
        tried: dict[Handle, Cost] = {}
        while stays := self._fluent(left, tried):
            cells = [left[key][0] for key in stays]
            turns = self.turns(cells, torch.stack(list(stays.values()), 1), SCREENS[-1])
            for key, cell, (after, cut) in zip(stays, cells, turns, strict=True):
                tried[cell] = replace(tried[cell], turned=after, cut=cut)
                if self._turns_much(cell, after):
                    _lower(left, key)
                else:
                    chosen[key] = cell
                    del left[key]
        return chosen, tried

    def _fluent(self, left: dict[Any, list[Handle]], tried: dict[Handle, Cost]) -> dict[Any, Tensor]:
        """Lower each queue to its first fluent edit.

        Args:
            left: The queues, which lose their edits that are not.
            tried: What edits cost, to which those tried are added.

        Returns:
            How many tokens of each answer stay under the first edit of each queue, `(prompts,)`.
        """
        found: dict[Any, Tensor] = {}
        n = len(self.reads)
        ends = [0, *(size for size in SCREENS if size < n), n]
        while front := {key: cells[0] for key, cells in left.items() if key not in found}:
            keys = list(front)
            nats = {key: torch.zeros(0, dtype=torch.float64) for key in keys}
            stay = {key: torch.zeros(0, dtype=torch.long) for key in keys}
            for rows in map(range, ends, ends[1:]):
                more, longer = self.score([front[key] for key in keys], rows)
                for i, key in enumerate(keys):
                    nats[key] = torch.cat([nats[key], more[:, i]])
                    stay[key] = torch.cat([stay[key], longer[:, i]])
                keys = [key for key in keys if self.bound(front[key], nats[key], UNLIKELY)[0] <= MAX_BPB]
                if not keys:
                    break
            tried |= {front[key]: Cost(column) for key, column in nats.items()}
            for key, cell in front.items():
                if key in keys and self.bound(cell, nats[key])[1] <= MAX_BPB:
                    found[key] = stay[key]
                else:
                    _lower(left, key)
        return found

    def _turns_much(self, cell: Handle, after: Sequence[bool]) -> bool:
        """Tell whether the bound fails even if no prompt that is not answered yet turns."""
        rows = self._read_by(cell).tolist()
        changed = sum(after[i] and not self.before[i] for i in rows if i < len(after))
        return 100 * binomial_interval(changed, len(rows), side="upper").high > MAX_PP


def _lower(left: dict[Any, list[Handle]], key: Any) -> None:
    """Leave the first edit of a queue and all that are as strong."""
    cell, *others = left[key]
    left[key] = [c for c in others if c.alpha < cell.alpha]
    if not left[key]:
        del left[key]
