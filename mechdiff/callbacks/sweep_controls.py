"""What stands beside a handle: edits of the same size that should do nothing, or less.

1. `random`: interchange in subspaces drawn isotropically, or where base's states vary, rescaled, prompt by
   prompt, to the length of the handle's own edit of that kind and rank. There are none for edits of tuned.
2. `other_prompt`: the interchange that another prompt would get. `wrong_layer`: the interchange written at
   half the depth (of the first block: of the model), as long relative to the states there. `label_swap`: the
   subspace of neutral prompts, and for `add` the opposite shift. `base_vs_base`: base's own state.
3. Every control takes the strength with its largest effect on dev prompts, as a handle does, but with no
   limit on what it costs; its effect is then read on evaluation prompts. A random subspace takes the strength
   with its largest effect on the evaluation prompts themselves, which favours it over the handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mechdiff.callbacks.handle_evaluation import Handle
from mechdiff.callbacks.sweep_effects import Arms, Targets
from mechdiff.callbacks.transfer_fit import stored_rows
from mechdiff.data.activations import ActivationPairs
from mechdiff.functional.handles import random_basis
from mechdiff.functional.stats import generator
from mechdiff.functional.steering import paired_svd
from mechdiff.interventions.sites import Site

if TYPE_CHECKING:
    from mechdiff.modules.subspaces import Subspaces

DRAWN = ("isotropic", "covariance")
PERCENTILE = 0.95
"""A handle's effect must exceed this share of those of random subspaces to be called one."""

Shift = Callable[[Targets, int], Tensor]
"""From prompts and one of them to a change of its state at the whole strength, `(shifts, d)`."""


@dataclass(frozen=True)
class Control:
    """One family of edits without an alpha.

    Attributes:
        name: As records call it.
        kind: The edit that it stands beside.
        ks: Rank of each of its shifts.
        shift: The shifts.
        site: Where they are written.
        solver: Who found the directions.
    """

    name: str
    kind: str
    ks: tuple[int, ...]
    shift: Shift
    site: Site
    solver: str


class Outcome(NamedTuple):
    """A control at the strength with its largest effect on dev.

    Attributes:
        control: The control.
        alphas: Strength of each of its shifts.
        arms: What they do to evaluation prompts.
    """

    control: Control
    alphas: list[float]
    arms: Arms


class Random(NamedTuple):
    """Random subspaces of one rank, in edits as long as those of one kind.

    Attributes:
        drawn: How they were drawn.
        kind: The edit whose length they have.
        k: Rank.
        recovery: Recovery of each draw on evaluation prompts, at its best strength, `(draws,)`.
        prompts: Numbers of these prompts.
    """

    drawn: str
    kind: str
    k: int
    recovery: Tensor
    prompts: list[int]

    @property
    def limit(self) -> float:
        """The percentile that an effect must exceed."""
        return float(self.recovery.quantile(PERCENTILE))


class Controls:
    """Controls of the interchange at one site.

    Args:
        module: The fitted subspaces.
        site: Where.
        ks: Ranks.
        alphas: Strengths.
        dev: Target prompts that choose the strength.
        final: Those that are reported.
        seed: Of the random subspaces.
    """

    def __init__(
        self,
        module: Subspaces,
        site: Site,
        ks: Sequence[int],
        alphas: Sequence[float],
        dev: Targets,
        final: Targets,
        seed: int,
    ) -> None:
        self.module, self.site, self.ks, self.alphas = module, site, tuple(ks), tuple(alphas)
        self.dev, self.final, self.seed = dev, final, seed

    def named(self, data: ActivationPairs | None, wrong: Site | None) -> Iterator[Outcome]:
        """Yield every control but the random subspaces.

        Args:
            data: Stored activations, for the subspace of neutral prompts.
            wrong: The site at another depth; None in a model of one block.
        """
        bases = [self.module.basis(self.site, None, k) for k in self.ks]
        own_solver = self.module.solver_name
        ratio = 1.0 if wrong is None else self._usual(wrong) / self._usual(self.site)

        def other(prompts: Targets, index: int) -> Tensor:
            own, _ = prompts.states(index, self.site, "into_base")
            theirs, donor = prompts.states((index + 1) % len(prompts.prompts), self.site, "into_base")
            return torch.cat([self._interchange(own, own + donor - theirs, basis) for basis in bases])

        def elsewhere(prompts: Targets, index: int) -> Tensor:
            own, donor = prompts.states(index, self.site, "into_base")
            return ratio * torch.cat([self._interchange(own, donor, basis) for basis in bases])

        def itself(prompts: Targets, index: int) -> Tensor:
            own, _ = prompts.states(index, self.site, "into_base")
            return torch.cat([self._interchange(own, own, basis) for basis in bases])

        found = [
            Control("other_prompt", "interchange", self.ks, other, self.site, own_solver),
            Control("base_vs_base", "interchange", self.ks, itself, self.site, own_solver),
            *self._swapped(data),
        ]
        if wrong is not None:
            found.append(Control("wrong_layer", "interchange", self.ks, elsewhere, wrong, own_solver))
        for control in found:
            yield self._outcome(control)

    def random(self, cells: Sequence[Handle], draws: int, final: int) -> Iterator[Random]:
        """Yield what random subspaces do, on a few prompts.

        Args:
            cells: Edits of base at their whole strength, whose ranks and lengths they have.
            draws: Subspaces of each kind; each serves all ranks.
            final: Evaluation prompts on which they are read, evenly over languages.
        """
        read = self.final.few(final)
        for drawn in DRAWN:
            held = dict(self._bases(drawn, draws))
            for cell in (cell for cell in cells if cell.k in held):

                def shift(
                    prompts: Targets, index: int, cell: Handle = cell, bases: Tensor = held[cell.k]
                ) -> Tensor:
                    own, donor = prompts.states(index, self.site, "into_base")
                    length = (cell.change(self.module, own, donor) - own).norm()
                    found = self._interchange(
                        own.expand(len(bases), 1, -1), donor.expand(len(bases), 1, -1), bases
                    )
                    return length * torch.nn.functional.normalize(found[:, 0], dim=-1)

                solver = cell.solver or self.module.solver_name
                control = Control("random", cell.kind, (cell.k,) * draws, shift, self.site, solver)
                recovery = self._all_strengths(self.final, control, read).recovery()
                best = recovery.nan_to_num(-torch.inf).view(len(self.alphas), draws).amax(0)
                yield Random(drawn, cell.kind, cell.k, best, read)

    def _bases(self, drawn: str, draws: int) -> Iterator[tuple[int, Tensor]]:
        """Yield ranks and subspaces, `(draws, k, d)`; those of a lower rank lie in those of a higher one."""
        factor = None if drawn == "isotropic" else self.module.covariance_factor(self.site).cpu()
        d = self.module.basis(self.site).shape[1]
        most = max(self.ks) if factor is None else min(max(self.ks), len(factor))
        if not most:  # base's states do not vary
            return
        source = generator(self.seed, "random", self.site, drawn)
        bases = torch.stack([random_basis(most, d, source, factor) for _ in range(draws)]).float()
        yield from ((k, bases[:, :k]) for k in self.ks if k <= most)

    def _swapped(self, data: ActivationPairs | None) -> Iterator[Control]:
        if data is not None:
            rows = stored_rows(data, "train", str(self.site))
            change = (rows.tuned.double() - rows.base.double())[~rows.target]
            ks = tuple(k for k in self.ks if k <= len(change))
            basis = paired_svd(change, max(ks)).basis.float() if ks else change.new_zeros(0, change.shape[1])

            def neutral(prompts: Targets, index: int) -> Tensor:
                own, donor = prompts.states(index, self.site, "into_base")
                return torch.cat([self._interchange(own, donor, basis[:k].to(own.device)) for k in ks])

            if ks:
                yield Control("label_swap", "interchange", ks, neutral, self.site, "paired_svd")
        shift = self.module.delta[self.module.index(self.site)]
        yield Control("label_swap", "add", (1,), lambda *_: -shift[None], self.site, "diff_mean")

    def _interchange(self, own: Tensor, donor: Tensor, basis: Tensor) -> Tensor:
        return self.module.change(self.site, "interchange", own, donor, basis=basis) - own

    def _all_strengths(self, prompts: Targets, control: Control, few: Sequence[int] | None = None) -> Arms:
        """Measure all shifts at all strengths, strength by strength."""
        grid = torch.tensor(self.alphas)

        def edited(index: int) -> Tensor:
            own, shift = self._state(prompts, control, index), control.shift(prompts, index)
            return (own + grid[:, None, None].to(own) * shift.to(own)).flatten(0, 1)

        return prompts.run(control.site, "into_base", edited, few)

    def _outcome(self, control: Control) -> Outcome:
        recovery = self._all_strengths(self.dev, control).recovery().nan_to_num(-torch.inf)
        best = recovery.view(len(self.alphas), len(control.ks)).argmax(0)
        alphas = torch.tensor(self.alphas)[best]

        def chosen(index: int) -> Tensor:
            own, shift = self._state(self.final, control, index), control.shift(self.final, index)
            return own + alphas[:, None].to(own) * shift.to(own)

        return Outcome(
            control,
            [self.alphas[i] for i in best.tolist()],
            self.final.run(control.site, "into_base", chosen),
        )

    def _usual(self, site: Site) -> float:
        """Return the median length of base's states."""
        return float(torch.stack([states[site].norm() for states in self.dev.base.states]).median())

    def _state(self, prompts: Targets, control: Control, index: int) -> Tensor:
        return prompts.base.states[index][control.site]
