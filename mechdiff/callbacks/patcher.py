"""Run the arms of a patching experiment: what the recipient would say next if one site held something else.

1. Each model reads each prompt once; the states at the sites are kept.
2. An arm rewrites the recipient's residuals at one site; only the blocks above the site are run again.
3. At the last position the keys and values of the earlier tokens are kept, and all arms are rows of one batch
   of single tokens.
4. At all positions the template's fixed beginning is kept as it is, and arms of prompts of similar length
   share a batch.
5. A position is patched where the rows of a fit come from: aligned, outside the template's beginning, and not
   the first of either prompt (an attention sink).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from mechdiff.callbacks.graded import Graded
from mechdiff.interventions.hooks import record
from mechdiff.interventions.likelihood import Layout, lay_out, total_logprobs
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.interventions.suffix import SuffixEngine, run_logits
from mechdiff.modules.base import UNTOUCHED, DiffModule
from mechdiff.pairs.alignment import PREFIX, SUFFIX, USER, Alignment, EncodedPrompt, common_start
from mechdiff.pairs.fairness import lost_mass, restrict_logits
from mechdiff.pairs.loading import LoadedModel

Where = Literal["last", "all"]
Direction = Literal["into_tuned", "into_base"]
Patch = tuple[Site, str, Where]  # with the name of the arm


@dataclass
class Side:
    """One model of a pair with what it makes of the prompts.

    Attributes:
        loaded: The frozen model.
        engine: Runs the blocks above a site.
        shared: Ids of the tokens that both models have, in the order of both.
        encoded: The prompts.
        states: Activations by prompt and site, ``(T, d)``; heads side by side.
        prefixes: Keys and values of all tokens but the last, by prompt.
        log_p: Clean next-token log-probabilities over the shared tokens by prompt, ``(shared,)``.
        lost: Probability of all other tokens by prompt.
    """

    loaded: LoadedModel
    engine: SuffixEngine
    shared: Tensor
    encoded: list[EncodedPrompt]
    states: list[dict[Site, Tensor]] = field(default_factory=list)
    prefixes: list[DynamicCache] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    @property
    def fixed(self) -> int:
        """Number of leading template tokens that all prompts have in common."""
        return common_start(self.encoded)

    def ids(self, index: int) -> Tensor:
        """Return the tokens of a prompt, ``(1, T)``."""
        return torch.tensor([self.encoded[index].input_ids], device=self.loaded.device)

    def restricted(self, logits: Tensor) -> Tensor:
        """Return log-probabilities over the shared tokens."""
        return restrict_logits(logits, self.shared)

    def grade(self, index: int, graded: Graded) -> float:
        """Return a graded behaviour (nats) of the model as it is now; nothing that was kept is used.

        Args:
            index: The prompt.
            graded: What is read.
        """
        ids, layout = self.ids(index), self.lay_out(index, graded)
        prefix = self.engine.prefill(ids[:, :-1])
        logits = run_logits(self.loaded.model, layout.tokens, layout.mask, layout.columns, prefix)
        return float(graded(total_logprobs(logits, layout)))

    def lay_out(self, index: int, graded: Graded) -> Layout:
        """Arrange what may follow a prompt in rows."""
        ids = self.ids(index)
        texts = [self.loaded.tokenizer(text, add_special_tokens=False).input_ids for text in graded.texts]
        return lay_out(int(ids[0, -1]), texts, ids.device)

    def read(self, sites: Sequence[Site], keep: Callable[[int], Iterable[Site]] | None = None) -> None:
        """Run every prompt once, unpadded; keep its states, keys and values, and next-token distribution.

        Args:
            sites: Sites whose states are kept.
            keep: Those that are kept of a prompt, by its index; all by default.
        """
        start = max(
            0, min([self.fixed, *(len(e) - 2 for e in self.encoded)])
        )  # what all begin with runs once
        with record(self.loaded.model, sites) as seen:
            common = self.engine.prefill(self.ids(0)[:, :start]) if start else None
            beginning = {site: [seen[site][0].flatten(1)] if start else [] for site in sites}
            for index in range(len(self.encoded)):
                ids, kept = self.ids(index), sites if keep is None else keep(index)
                prefix = self.engine.prefill(ids[:, start:-1], common)
                before = {site: [*beginning[site], seen[site][0].flatten(1)] for site in kept}
                logits = run_logits(self.loaded.model, ids[:, -1:], prefix=prefix)
                self.states.append(
                    {site: torch.cat([*before[site], seen[site][0].flatten(1)]) for site in kept}
                )
                self.prefixes.append(prefix)
                self.log_p.append(self.restricted(logits)[0])
                self.lost.append(lost_mass(logits, self.shared).item())


@dataclass(eq=False)
class Patcher:
    """Patches one recipient.

    Attributes:
        module: The maps.
        recipient: The model that is patched.
        donor: The other model.
        aligned: For each prompt, where recipient (a) and donor (b) are at the same place.
        direction: Which of the two the recipient is; it decides what is mapped.
        tokens_per_batch: Tokens run at once when all positions are patched.
        arms: What is done, by name.
        known: Groups of positions that can be patched.
        sites: Residual sites that are patched.
        where: Index into ``POSITIONS`` of each token of each prompt, ``(T,)``, or ``UNTOUCHED``.
    """

    module: DiffModule
    recipient: Side
    donor: Side
    aligned: Sequence[Alignment]
    direction: Direction
    tokens_per_batch: int
    arms: list[str] = field(init=False)
    known: list[str] = field(init=False)
    sites: list[Site] = field(init=False)
    where: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        module, recipient, donor = self.module, self.recipient, self.donor
        whole = {"into_base": ["real"], "into_tuned": ["raw"]}[self.direction]
        equal = recipient.loaded.width == donor.loaded.width  # else a state does not fit as it is
        self.arms = [*(whole if equal else []), "mapped", *module.controls(), "self"]
        self.known = module.positions
        self.sites = [site for site in map(Site.parse, module.sites) if site.component == "resid_post"]
        self.where = [
            groups(pairs, mine, other)
            for pairs, mine, other in zip(self.aligned, recipient.encoded, donor.encoded, strict=True)
        ]

    def patched(self, positions: Where) -> list[int]:
        """Return the prompts in which something is patched and every patched place has a map, by index.

        A patch of all positions needs maps for all groups that occur, or the arms would touch different
        places.
        """
        if positions == "last":
            last = POSITIONS.index("last")
            return [i for i, where in enumerate(self.where) if "last" in self.known and where[-1] == last]
        mapped = {POSITIONS.index(name) for name in self.known}
        found = [set(where[where != UNTOUCHED].tolist()) for where in self.where]
        if not set().union(*found) <= mapped:
            return []
        return [i for i, occurring in enumerate(found) if occurring]

    def arms_at(self, site: Site, positions: Where) -> Sequence[str]:
        """Return what is done at a site and group of positions."""
        return self.arms

    def last(self, index: int, sites: Sequence[Site] | None = None) -> Iterator[tuple[Site, Tensor]]:
        """Yield, for each site, the log-probabilities ``(arms, shared)`` with the last position patched.

        Args:
            index: The prompt.
            sites: Where to patch, by default at every site.
        """
        ids, prefix = self.recipient.ids(index), self.recipient.prefixes[index]
        for site in self.sites if sites is None else sites:
            arms = self.arms_at(site, "last")
            hidden = torch.stack([self.edited(index, site, arm, "last")[-1:] for arm in arms])
            tokens = ids[:, -1:].expand(len(arms), -1)
            logits = self.recipient.engine.resume(site.layer, hidden, tokens, prefix=prefix)
            yield site, self.recipient.restricted(logits)

    def everywhere(
        self, indices: Sequence[int], sites: Sequence[Site] | None = None
    ) -> Iterator[tuple[int, Site, Tensor]]:
        """Yield, for each prompt and site, the same with all aligned positions patched."""
        side, sites = self.recipient, self.sites if sites is None else sites
        start = side.fixed
        prefix = side.engine.prefill(side.ids(0)[:, :start]) if start else None
        most = max((len(self.arms_at(site, "all")) for site in sites), default=1)
        for batch in self._batches(indices, start, most):
            each = torch.tensor([len(side.encoded[i]) - start for i in batch])
            padded = _padded([side.ids(i)[0, start:] for i in batch])
            for site in sites:
                arms = self.arms_at(site, "all")
                lengths, tokens = (part.repeat_interleave(len(arms), 0) for part in (each, padded))
                mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long().to(tokens.device)
                states = [self.edited(i, site, arm, "all")[start:] for i in batch for arm in arms]
                logits = side.engine.resume(
                    site.layer, _padded(states), tokens, mask, prefix=prefix, logits_at=lengths - 1
                )
                rows = side.restricted(logits).split(len(arms))
                yield from ((index, site, row) for index, row in zip(batch, rows, strict=True))

    def graded(
        self,
        index: int,
        graded: Graded,
        sites: Sequence[Site] | None = None,
        arms: Sequence[str] = ("real", "mapped"),
    ) -> Iterator[tuple[Site, dict[str, float]]]:
        """Yield, for each site, a graded behaviour (nats) as it is and with the last position patched.

        Args:
            index: The prompt.
            graded: What is read.
            sites: Where to patch, by default at every site.
            arms: What is done.

        Yields:
            The site, and the number by arm, with that of the clean run as ``self``.
        """
        sites = self.sites if sites is None else sites
        clean, found = self.readings(index, graded, [(site, arm, "last") for site in sites for arm in arms])
        for site in sites:
            yield site, {"self": clean} | {arm: found[site, arm, "last"] for arm in arms}

    def readings(
        self, index: int, graded: Graded, cells: Sequence[Patch]
    ) -> tuple[float, dict[Patch, float]]:
        """Read a graded behaviour (nats) of the recipient as it is, and under each of some patches.

        Args:
            index: The prompt.
            graded: What is read.
            cells: Site, arm, and whether the last position is patched or every aligned one.
        """
        side, layout = self.recipient, self.recipient.lay_out(index, graded)
        own, ids, rows = side.prefixes[index], side.ids(index)[:, :-1], (layout.tokens, layout.mask)
        with record(side.loaded.model, [site for site, *_ in cells]) as states:
            clean = run_logits(side.loaded.model, *rows, layout.columns, own)
        found = {}
        for site, arm, positions in cells:
            edited, prefix = self.edited(index, site, arm, positions), own
            if positions == "all":
                prefix = side.engine.prefill_from(site.layer, edited[None, :-1], ids, own)
            hidden = states[site].clone()
            hidden[:, 0] = edited[-1]
            logits = side.engine.resume(site.layer, hidden, *rows, prefix=prefix, logits_at=layout.columns)
            found[site, arm, positions] = float(graded(total_logprobs(logits, layout)))
        return float(graded(total_logprobs(clean, layout))), found

    def edited(self, index: int, site: Site, arm: str, positions: Where) -> Tensor:
        """Return the recipient's residuals at a site as an arm leaves them, ``(T, d)``."""
        own = self.recipient.states[index][site]
        where = self.where[index].to(own.device)
        if positions == "last":
            where = where.masked_fill(where != POSITIONS.index("last"), UNTOUCHED)
        source = Site.parse(self.module.sources[self.module.sites.index(str(site))])
        donor = {s: self.donated(index, s, arm)[None] for s in {site, source}}
        edit = self.module.edits(donor, where[None], site=site, kind=self.kind(arm)).get(site)
        return own if edit is None else edit(own[None], torch.arange(len(where), device=own.device)[None])[0]

    def kind(self, arm: str) -> str:
        """Return the kind of edit that an arm is."""
        return "raw" if arm == "real" else arm

    def donated(self, index: int, site: Site, arm: str) -> Tensor:
        """Return what an arm starts from, ``(T, d)``: the donor's states, or the own."""
        if self.direction == "into_base" and arm != "real":
            return self.recipient.states[index][site]
        return self.given(index, site)

    def given(self, index: int, site: Site) -> Tensor:
        """Return the donor's states in the recipient's rows, ``(T, d)``; 0 where nothing is aligned."""
        aligned, states = self.aligned[index], self.donor.states[index][site]
        rows = states.new_zeros(len(self.recipient.encoded[index]), states.shape[-1])
        rows[aligned.positions_a] = states[aligned.positions_b]
        return rows

    def _batches(self, indices: Sequence[int], start: int, arms: int) -> Iterable[list[int]]:
        """Group prompts of similar length so that all their arms fit into one batch, whatever their order."""
        encoded = self.recipient.encoded
        batch: list[int] = []
        for index in sorted(indices, key=lambda i: (len(encoded[i]), encoded[i].input_ids)):
            if batch and (len(batch) + 1) * (len(encoded[index]) - start) * arms > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def groups(aligned: Alignment, mine: EncodedPrompt, other: EncodedPrompt) -> Tensor:
    """Return the index into ``POSITIONS`` of each token, ``(T,)``; ``UNTOUCHED`` where no map acts.

    Args:
        aligned: Where the two prompts are at the same place.
        mine: The prompt as the recipient sees it.
        other: The prompt as the donor sees it.
    """
    where = torch.full((len(mine),), UNTOUCHED)
    for i, j, region in zip(*(part.tolist() for part in aligned[:3]), strict=True):
        if region == PREFIX or i == 0 or j == 0:
            continue
        ends = (i == len(mine) - 1, j == len(other) - 1)
        # A place is the last one before the answer only if it is so for both models.
        name = "last" if all(ends) else "template" if region == SUFFIX else "user"
        assert region in (USER, SUFFIX)
        where[i] = POSITIONS.index(name)
    return where


def _padded(parts: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
