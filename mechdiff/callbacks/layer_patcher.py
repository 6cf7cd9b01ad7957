"""Arms of a cross-model layer patch: the donor's state, and changes of the same size that should do less.

1. ``raw``: the donor's state replaces the recipient's, h + δ with δ = h_donor − h_recipient of this prompt.
2. ``other_prompt``: h + δ of another prompt, at the same group of positions.
3. ``random``: h + a draw from the covariance of δ over prompts, as long as δ.
4. ``wrong_layer``: h + δ of the site half the list of sites away, as long as δ.
5. ``self``: h put back through the same path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mechdiff.callbacks.patcher import Patcher, Where
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.stats import generator
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.modules.base import UNTOUCHED

Columns = dict[int, dict[str, tuple[float, float]]]  # prompt → arm → nats from the donor, from the recipient
CONTROLS = ("other_prompt", "random", "wrong_layer")


@dataclass(eq=False)
class LayerPatcher(Patcher):
    """Patches the donor's states, as they are, into one recipient of the same width.

    Attributes:
        controlled: Sites at which the controls are run; the states of their `wrong` sites are needed too.
        names: Id of each prompt.
        seed: Seed of what is drawn.
    """

    controlled: list[Site]
    names: list[str]
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.known = list(POSITIONS)  # nothing fitted is needed
        self.arms = ["raw", "self"]
        self._pool = lru_cache(maxsize=2 * len(POSITIONS))(self._all_changes)

    def arms_at(self, site: Site, positions: Where) -> Sequence[str]:
        """Return what is done at a site: everything where there are controls."""
        if site in self.controlled:
            controls = CONTROLS if wrong_site(self.sites, site) != site else CONTROLS[:-1]
            return ["raw", *controls, "self"]
        return self.arms if positions == "last" else ["raw"]

    def kind(self, arm: str) -> str:
        """Return the kind of edit that an arm is."""
        return "self" if arm == "self" else "raw"

    def donated(self, index: int, site: Site, arm: str) -> Tensor:
        """Return what an arm puts in, ``(T, d)``."""
        if arm in ("raw", "self"):
            return self.given(index, site)
        own = self.recipient.states[index][site]
        change = torch.zeros_like(own)
        for group in range(len(POSITIONS)):
            rows = (self.where[index] == group).to(own.device)
            if rows.any():
                change[rows] = self._control(index, site, group, arm)
        return own + change

    def _control(self, index: int, site: Site, group: int, arm: str) -> Tensor:
        """Return what a control adds at a group of positions, ``(rows, d)``."""
        true = self._changes(index, site, group)
        if arm == "other_prompt":
            other = self._other(index, site, group)
            return other[torch.arange(len(true), device=other.device) % len(other)]
        if arm == "wrong_layer":
            return _as_long(self._changes(index, wrong_site(self.sites, site), group), true)
        assert arm == "random", arm
        pool = self._pool(site, group)
        draws = generator(self.seed, "random", self.direction, site, group, self.names[index])
        weights = torch.randn(len(true), len(pool), generator=draws).to(pool)
        return _as_long(weights @ pool, true)

    def _changes(self, index: int, site: Site, group: int) -> Tensor:
        """Return donor − recipient at a group of positions of a prompt, ``(rows, d)``."""
        rows = self.where[index] == group
        return (self.given(index, site) - self.recipient.states[index][site])[rows]

    def _all_changes(self, site: Site, group: int) -> Tensor:
        """Return the same over all prompts that hold the site, centred, ``(rows, d)``."""
        changes = torch.cat([self._changes(i, site, group) for i in self._ordered(site)])
        return changes - changes.mean(0)

    def _other(self, index: int, site: Site, group: int) -> Tensor:
        """Return the change of the next prompt, in a drawn order, that has one at this group."""
        names = self._ordered(site)
        order = torch.randperm(len(names), generator=generator(self.seed, "other_prompt")).tolist()
        cycle = [names[i] for i in order]
        start = cycle.index(index)
        after = (cycle[(start + step) % len(cycle)] for step in range(1, len(cycle) + 1))
        return self._changes(next(i for i in after if (self.where[i] == group).any()), site, group)

    def _ordered(self, site: Site) -> list[int]:
        """Return the prompts that hold a site and are patched somewhere, by name."""
        holding = [
            i
            for i, states in enumerate(self.recipient.states)
            if site in states and bool((self.where[i] != UNTOUCHED).any())
        ]
        return sorted(holding, key=lambda i: self.names[i])


def unpatched(patcher: LayerPatcher, cell: Iterable[int]) -> Tensor:
    """Return KL(P_donor ‖ P_recipient) of prompts in nats, ``(prompts,)``."""
    pairs = [(patcher.donor.log_p[i], patcher.recipient.log_p[i]) for i in cell]
    return torch.stack([kl_divergence(*pair).cpu() for pair in pairs])


def to_donor(cell: Columns) -> Tensor:
    """Return KL(P_donor ‖ P_patched) of prompts in nats, ``(prompts,)``."""
    return torch.tensor([arms["raw"][0] for arms in cell.values()], dtype=torch.float64)


def moved_by(cell: Columns) -> Tensor:
    """Return KL(P_recipient ‖ P_patched) of prompts in nats, ``(prompts,)``."""
    return torch.tensor([arms["raw"][1] for arms in cell.values()], dtype=torch.float64)


def wrong_site(sites: Sequence[Site], site: Site) -> Site:
    """Return the site half the list away; itself if it is alone."""
    return sites[(sites.index(site) + len(sites) // 2) % len(sites)]


def _as_long(change: Tensor, true: Tensor) -> Tensor:
    """Scale rows to the length of others; a row of zeros stays one."""
    length = change.norm(dim=-1, keepdim=True)
    return change * true.norm(dim=-1, keepdim=True) / length.clamp(min=torch.finfo(change.dtype).tiny)
