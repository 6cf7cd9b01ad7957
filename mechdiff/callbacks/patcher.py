"""Run the arms of a patching experiment: what the recipient would say next if one site held something else.

1. Each model reads each prompt once; the residuals at the sites are kept.
2. An arm rewrites the recipient's residuals at one site; only the blocks above the site are run again.
3. At the last position the keys and values of the earlier tokens are kept, and all arms are rows of one batch of single tokens.
4. At all positions the template's fixed beginning is kept as it is, and arms of prompts of similar length share a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mechdiff.functional.metrics import logodds
from mechdiff.interventions.hooks import record
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.modules.base import UNTOUCHED, DiffModule
from mechdiff.pairs.alignment import PREFIX, SUFFIX, USER, Alignment, EncodedPrompt
from mechdiff.pairs.fairness import lost_mass, restrict_logits
from mechdiff.pairs.loading import LoadedModel

Where = Literal["last", "all"]
Direction = Literal["into_tuned", "into_base"]
Openings = tuple[list[str], list[str]]  # refusing, complying


@dataclass
class Side:
    """One model of a pair with what it makes of the prompts.

    Attributes:
        loaded: The frozen model.
        engine: Runs the blocks above a site.
        shared: Ids of the tokens that both models have, in the order of both.
        encoded: The prompts.
        states: Residuals by prompt and site, ``(T, d)``.
        log_p: Clean next-token log-probabilities over the shared tokens by prompt, ``(shared,)``.
        lost: Probability of all other tokens by prompt.
    """

    loaded: LoadedModel
    engine: SuffixEngine
    shared: Tensor
    encoded: list[EncodedPrompt]
    states: list[dict[Site, Tensor]] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    @property
    def fixed(self) -> int:
        """Number of leading template tokens that all prompts have in common."""
        lengths = [
            next((i for i, r in enumerate(e.regions) if r != PREFIX), len(e) - 1) for e in self.encoded
        ]
        length = min(lengths, default=0)
        return length if len({tuple(e.input_ids[:length]) for e in self.encoded}) == 1 else 0

    def ids(self, index: int) -> Tensor:
        """Return the tokens of a prompt, ``(1, T)``."""
        return torch.tensor([self.encoded[index].input_ids], device=self.loaded.device)

    def restricted(self, logits: Tensor) -> Tensor:
        """Return log-probabilities over the shared tokens."""
        return restrict_logits(logits, self.shared)

    def read(self, sites: Sequence[Site]) -> None:
        """Run every prompt once, unpadded, and keep its states and its next-token distribution."""
        for index in range(len(self.encoded)):
            run = self.engine.clean(self.ids(index), None, [site.layer for site in sites])
            self.states.append({site: run.states[site.layer][0].clone() for site in sites})
            self.log_p.append(self.restricted(run.logits)[0])
            self.lost.append(lost_mass(run.logits, self.shared).item())


class Patcher:
    """Patches one recipient.

    Args:
        module: The maps.
        recipient: The model that is patched.
        donor: The other model.
        aligned: For each prompt, where recipient (a) and donor (b) are at the same place.
        direction: Which of the two the recipient is; it decides what is mapped.
        tokens_per_batch: Tokens run at once when all positions are patched.
    """

    def __init__(
        self,
        module: DiffModule,
        recipient: Side,
        donor: Side,
        aligned: Sequence[Alignment],
        direction: Direction,
        tokens_per_batch: int,
    ) -> None:
        self.module, self.recipient, self.donor, self.aligned = module, recipient, donor, aligned
        self.direction, self.tokens_per_batch = direction, tokens_per_batch
        self.arms = ["real" if direction == "into_base" else "raw", "mapped", *module.controls(), "self"]
        self.sites = [Site.parse(name) for name in module.sites]

    def last(self, index: int) -> Iterator[tuple[Site, dict[str, Tensor]]]:
        """Yield, for each site, the restricted log-probabilities ``(shared,)`` of each arm at the last position of a prompt."""
        ids = self.recipient.ids(index)
        prefix = self.recipient.engine.prefill(ids[:, :-1])
        for site in self.sites:
            hidden = torch.stack([self.edited(index, site, arm, "last")[-1:] for arm in self.arms])
            tokens = ids[:, -1:].expand(len(self.arms), -1)
            logits = self.recipient.engine.resume(site.layer, hidden, tokens, prefix=prefix)
            yield site, dict(zip(self.arms, self.recipient.restricted(logits), strict=True))

    def everywhere(self) -> Iterator[tuple[int, Site, dict[str, Tensor]]]:
        """Yield, for each prompt and site, the same with all aligned positions patched."""
        side = self.recipient
        start = side.fixed
        prefix = side.engine.prefill(side.ids(0)[:, :start]) if start else None
        for batch in self._batches(start):
            lengths = torch.tensor([len(side.encoded[i]) - start for i in batch]).repeat_interleave(
                len(self.arms)
            )
            tokens = _padded([side.ids(i)[0, start:] for i in batch]).repeat_interleave(len(self.arms), 0)
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long().to(tokens.device)
            for site in self.sites:
                hidden = _padded(
                    [self.edited(i, site, arm, "all")[start:] for i in batch for arm in self.arms]
                )
                logits = side.engine.resume(
                    site.layer, hidden, tokens, mask, prefix=prefix, logits_at=lengths - 1
                )
                rows = side.restricted(logits).split(len(self.arms))
                for index, row in zip(batch, rows, strict=True):
                    yield index, site, dict(zip(self.arms, row, strict=True))

    def refusal_logodds(self, index: int, openings: Openings) -> Iterator[tuple[Site, dict[str, float]]]:
        """Yield, for each site, the log-odds of refusing under the arms ``real``, ``mapped`` and ``self`` at the last position."""
        side, ids = self.recipient, self.recipient.ids(index)
        texts = [
            side.loaded.tokenizer(text, add_special_tokens=False).input_ids
            for kind in openings
            for text in kind
        ]
        follow = _padded([torch.tensor(text, device=ids.device) for text in texts])
        tokens = torch.cat([ids[:, -1:].expand(len(texts), -1), follow[:, :-1]], 1)
        lengths = torch.tensor([len(text) for text in texts], device=ids.device)
        mask = (torch.arange(tokens.shape[1], device=ids.device) < lengths[:, None]).long()
        columns = torch.arange(tokens.shape[1], device=ids.device).expand(len(texts), -1)
        prefix = side.engine.prefill(ids[:, :-1])
        with record(side.loaded.model, self.sites) as states:
            clean = run_logits(side.loaded.model, tokens, mask, columns, prefix)

        def odds(logits: Tensor) -> float:
            chosen = logits.float().log_softmax(-1).gather(-1, follow[..., None])[..., 0]
            refusing, complying = (chosen * mask).sum(1).split([len(kind) for kind in openings])
            return float(logodds(refusing, complying))

        reference = odds(clean)
        for site in self.sites:
            result = {"self": reference}
            for arm in ("real", "mapped"):
                hidden = states[site].clone()
                hidden[:, 0] = self.edited(index, site, arm, "last")[-1]
                result[arm] = odds(
                    side.engine.resume(site.layer, hidden, tokens, mask, prefix=prefix, logits_at=columns)
                )
            yield site, result

    def edited(self, index: int, site: Site, arm: str, positions: Where) -> Tensor:
        """Return the recipient's residuals at a site as an arm leaves them, ``(T, d)``."""
        own = self.recipient.states[index]
        aligned = self.aligned[index]
        where = torch.full((len(own[site]),), UNTOUCHED, device=own[site].device)
        where[aligned.positions_a] = groups(aligned).to(where.device)
        if positions == "last":
            where[where != POSITIONS.index("last")] = UNTOUCHED
        borrowed = self.direction == "into_tuned" or arm == "real"
        donor = self._in_rows_of_recipient(index) if borrowed else own
        kind = "raw" if arm == "real" else arm
        edits = self.module.edits({s: h[None] for s, h in donor.items()}, where[None], site=site, kind=kind)
        edit = edits.get(site)
        positions_of_tokens = torch.arange(len(where), device=where.device)[None]
        return own[site] if edit is None else edit(own[site][None], positions_of_tokens)[0]

    def _in_rows_of_recipient(self, index: int) -> Mapping[Site, Tensor]:
        aligned, length = self.aligned[index], len(self.recipient.encoded[index])
        moved = {}
        for site, states in self.donor.states[index].items():
            rows = states.new_zeros(length, states.shape[-1])
            rows[aligned.positions_a] = states[aligned.positions_b]
            moved[site] = rows
        return moved

    def _batches(self, start: int) -> Iterable[list[int]]:
        """Group prompts of similar length so that all their arms fit into one batch."""
        lengths = [len(e) - start for e in self.recipient.encoded]
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            if batch and (len(batch) + 1) * lengths[index] * len(self.arms) > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def groups(aligned: Alignment) -> Tensor:
    """Return the index into ``POSITIONS`` of each aligned pair, ``(pairs,)``; ``UNTOUCHED`` in the template's beginning."""
    names = torch.full_like(aligned.regions, UNTOUCHED)
    names[aligned.regions == USER] = POSITIONS.index("user")
    names[aligned.regions == SUFFIX] = POSITIONS.index("template")
    names[(aligned.regions == SUFFIX) & (aligned.offsets == -1)] = POSITIONS.index("last")
    return names


def _padded(parts: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
