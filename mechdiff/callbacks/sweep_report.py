"""How the numbers of a sweep become records."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.base import Item
from mechdiff.callbacks.handle_evaluation import ANSWER, CHOSEN, ENOUGH, LAST, Handle, HandleEvaluation
from mechdiff.callbacks.sweep_behaviour import Moved
from mechdiff.callbacks.sweep_controls import Random
from mechdiff.callbacks.sweep_effects import INTO_TUNED, Arms, direction
from mechdiff.functional.handles import minimal_k
from mechdiff.functional.proportions import binomial_interval
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import estimated, missing
from mechdiff.results import Record, apart

INTO_BASE = ("interchange", "mapped", "amplify", "add")
EDITS = (*INTO_BASE, *INTO_TUNED)
WORTH = 0.2
"""Recovery that makes the smallest rank with it the handle that later evaluations go on from."""
NONE = {True: "none_feasible", False: "no_effect"}
"""Why no strength was chosen, by whether any of them did anything on dev."""
THRESHOLDS = {"minimal_k_10": 0.1, "minimal_k_20": 0.2}
NEARLY_ALL = 0.9
"""Share of what the whole state does that the rank of a difference must reach."""

Key = tuple[str, int]  # kind and rank


def quantity(kind: str) -> str:
    """Return what the recovery of an edit is called."""
    return "ablate_effect" if kind in INTO_TUNED else "interchange_recovery"


class SweepReport(HandleEvaluation):
    """Makes the records of `Steering`."""

    edits: tuple[str, ...] = EDITS

    def __init__(self) -> None:
        super().__init__()
        self.finalists: list[Handle] = []

    def _about(
        self, site: Site, split: str, cell: Handle | None = None, acts_on: str = LAST, **more: Any
    ) -> dict[str, Any]:
        """Say what a record is of.

        Args:
            site: Where.
            split: Of the prompts.
            cell: The edit.
            acts_on: Tokens that it changes: the last of the prompt, and those of the answer or not.
            **more: What else goes into `params`.
        """
        params = {**(cell.params if cell else {}), "acts_on": acts_on, "contrast": self.contrast, **more}
        return {
            "question": "rq3",
            "site": str(site),
            "split": split,
            "positions": "last",
            "unit": "fraction",
            "params": params,
        }

    def _share(self, arms: Arms, i: int, quantity: str, about: Mapping[str, Any]) -> Record:
        return self.ratio(arms.nats[:, i], arms.gap, arms.noise, quantity, **about)

    def _curve(self, cells: Sequence[Handle], arms: Arms) -> Iterator[Record]:
        for i, cell in enumerate(cells):
            more = {"metric": "recovery"} if cell.kind in INTO_TUNED else {}
            about = self._about(cell.site, "dev", cell, **more)
            yield self._share(arms, i, quantity(cell.kind), about)
            about = {**self._about(cell.site, "dev", cell), "unit": "of median |h|"}
            yield self.mean(arms.size[:, i] / arms.usual, "edit_norm", **about)

    def _nothing(self, site: Site, n: int) -> Iterator[Record]:
        about = {**self._about(site, "dev"), "n": n, "unit": "directions"}
        for quantity in ("minimal_k_10", "minimal_k_20", "minimal_k_90", CHOSEN):
            yield missing(quantity, "gap_too_small", {**about, "params": {"edit": "interchange"}})

    def _chosen(
        self,
        site: Site,
        chosen: Mapping[Key, Handle],
        swept: Mapping[tuple[Site, str], tuple[list[Handle], Arms]],
        able: Collection[Key],
        n: int,
    ) -> Iterator[Record]:
        """Yield, by kind, the smallest rank that is worth it, or else the one with the largest effect."""
        for kind in self.edits:
            cells, arms = swept[site, direction(kind)]
            effects = dict(zip(cells, arms.recovery().tolist(), strict=True))
            held = sorted((cell for (name, _), cell in chosen.items() if name == kind), key=lambda c: c.k)
            worth = [cell for cell in held if effects[cell] >= WORTH]
            about = {**self._about(site, "dev"), "n": n, "unit": "directions"}
            if not held:
                reason = NONE[any(name == kind for name, _ in able)]
                yield missing(CHOSEN, reason, {**about, "params": {"edit": kind}})
                continue
            cell = worth[0] if worth else max(held, key=lambda c: effects[c])
            about["params"] = {"edit": kind, "alpha": cell.alpha, "solver": cell.solver}
            self.finalists.append(cell)
            yield Record(quantity=CHOSEN, value=float(cell.k), **about)

    def _random(self, site: Site, found: Random, solver: str, own: Record | None) -> Record:
        """Return the range of random subspaces; beside it the chosen edit's recovery on the same prompts."""
        low, middle, high = found.recovery.quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
        params: dict[str, Any] = {"edit": found.kind, "k": found.k, "solver": solver, "draw": found.drawn}
        about = self._about(site, "eval", **params, draws=len(found.recovery))
        if own is not None and own.value is not None:
            about["params"]["handle"] = {"value": own.value, "low": own.low, "high": own.high}
        about |= {"control": "random", "low": low, "high": high, "n": len(found.prompts)}
        if len(found.recovery) < ENOUGH:
            about["flags"] = ("few_draws",)
        return Record(quantity="interchange_recovery", value=middle, **about)

    def _beside(self, effect: Record | None, cell: Handle, random: Sequence[Random]) -> tuple[str, ...]:
        """Flag an edit that random ones as long equal on the same prompts, or that has too few beside it.

        Args:
            effect: Recovery of the edit on the prompts that random ones were given.
            cell: The edit.
            random: Random edits.
        """
        found = [r for r in random if (r.kind, r.k) == (cell.kind, cell.k)]
        if effect is None or not found or any(len(r.recovery) < ENOUGH for r in found):
            return ("no_random_control",)
        within = effect.value is not None and effect.value <= max(r.limit for r in found)
        return ("within_random",) if within else ()

    def _on_few(self, arms: Arms, i: int, cell: Handle, random: Sequence[Random]) -> Record | None:
        """Return the recovery of an edit on the prompts that random ones of its kind and rank were given."""
        rows = next((r.prompts for r in random if (r.kind, r.k) == (cell.kind, cell.k)), None)
        if rows is None:
            return None
        few = arms._replace(nats=arms.nats[rows], gap=arms.gap[rows])
        return self._share(few, i, quantity(cell.kind), self._about(cell.site, "eval", cell))

    def _wrong_way(self, arms: Arms, i: int, cell: Handle) -> Record:
        """Return the share of prompts that an edit drives away from the model it imitates."""
        away = arms.nats[:, i] > arms.gap + 3 * arms.noise
        return estimated(
            "wrong_way", binomial_interval(int(away.sum()), len(away)), self._about(cell.site, "eval", cell)
        )

    def _small(
        self, site: Site, ks: Sequence[int], shares: Mapping[Key, Record], able: Collection[Key]
    ) -> Iterator[Record]:
        """Yield the smallest rank that recovers a tenth and a fifth, and those that the intervals allow."""
        for kind in (kind for kind in ("interchange", "mapped") if kind in self.edits):
            held = [shares[kind, k] for k in ks if (kind, k) in shares]
            at = [int(r.params["k"]) for r in held]
            for name, threshold in THRESHOLDS.items():
                found = minimal_k(at, [r.value for r in held], threshold)
                about = {**self._about(site, "eval"), "unit": "directions", "params": {"edit": kind}}
                about["n"] = max((r.n for r in held), default=0)
                if found is None:
                    reasons = {r.reason for r in held if r.reason}
                    reason = (
                        NONE[any(name == kind for name, _ in able)]
                        if not held
                        else reasons.pop()
                        if len(reasons) == 1
                        else "not_reached"
                    )
                    yield missing(name, reason, about)
                    continue
                about["flags"] = shares[kind, found].flags
                low, high = (
                    minimal_k(at, ends, threshold) for ends in ([r.high for r in held], [r.low for r in held])
                )
                yield Record(quantity=name, value=found, low=low, high=high, **about)

    def _rank(self, site: Site, solver: str, ks: Sequence[int], arms: Arms, width: int) -> Iterator[Record]:
        """Yield the smallest rank whose whole interchange does nearly all of what the whole state does.

        Args:
            site: Where.
            solver: Who found the directions.
            ks: Ranks.
            arms: The interchange of each rank, and last of the whole state.
            width: Of the states.
        """
        about = {**self._about(site, "eval"), "unit": "fraction"}
        params: dict[str, Any] = {"alpha": 1.0, "solver": solver}
        whole = arms.nats[:, -1]
        shares = []
        for i, k in enumerate([*ks, width]):
            cell = {**about, "params": {**params, "edit": "whole_strength", "k": k}}
            yield self._share(arms, i, "interchange_recovery", cell)
            missed, does = arms.nats[:, i] - whole, arms.gap - whole
            shares.append(self.ratio(missed, does, arms.noise, "interchange_recovery", **cell))
        about |= {"unit": "directions", "params": params, "n": len(whole)}
        values, lows, highs = ([getattr(r, end) for r in shares] for end in ("value", "low", "high"))
        found = minimal_k([*ks, width], values, NEARLY_ALL)
        if found is None or found == width:
            reason = next((r.reason for r in shares if r.reason), None) or "not_reached"
            yield missing("minimal_k_90", reason, about)
            return
        low, high = (minimal_k([*ks, width], ends, NEARLY_ALL) for ends in (highs, lows))
        yield Record(quantity="minimal_k_90", value=found, low=low, high=high, **about)

    def _moved(self, cell: Handle, metric: str, moved: Moved, acts_on: str = LAST) -> Record:
        """Return the share of the gap in behaviour that an edit closes."""
        name = "ablate_effect" if cell.kind in INTO_TUNED else "steer_effect"
        sign = 1.0 if (moved.end - moved.start).mean() >= 0 else -1.0  # a gap that points down is one too
        about = self._about(cell.site, "eval", cell, acts_on, metric=metric)
        left, whole = sign * (moved.end - moved.value), sign * (moved.end - moved.start)
        self._keep(moved.prompts, cell, metric, moved.value)
        return self.ratio(left, whole, moved.noise, name, **about)

    def _behaviours(
        self,
        graded: Sequence[tuple[str, Handle, Moved]],
        generated: Sequence[tuple[str, Handle, Moved, int]],
    ) -> Iterator[Record]:
        """Yield graded and generated effects; a generated one that contradicts a graded one is flagged."""
        by_cell: dict[Handle, list[Record]] = {}
        for metric, cell, moved in graded:
            by_cell.setdefault(cell, []).append(self._moved(cell, metric, moved))
        for found in by_cell.values():
            yield from found
        for metric, cell, moved, cut in generated:
            record = self._moved(cell, metric, moved, ANSWER)
            flags = list(record.flags)
            if any(apart(record, other) for other in by_cell.get(cell, ())):
                flags.append("disagrees_with_graded")
            if cut:
                flags.append("cut_answers")
            yield replace(record, flags=tuple(flags))

    def _keep(self, prompts: Sequence[str], cell: Handle, name: str, values: Tensor) -> None:
        arm = f"{cell.kind}/{cell.k}"
        self.items += [
            Item(prompt, f"handle_{name}", str(cell.site), "last", direction(cell.kind), arm, x)
            for prompt, x in zip(prompts, values.tolist(), strict=True)
        ]


def smallest(cells: Sequence[Handle], arms: Arms) -> Iterator[Handle]:
    """Yield, by kind, the edit of the smallest rank that recovers a tenth, and a fifth.

    Args:
        cells: Edits.
        arms: What they do.
    """
    effects = dict(zip(cells, arms.recovery().tolist(), strict=True))
    for kind, threshold in product(dict.fromkeys(c.kind for c in cells), THRESHOLDS.values()):
        if able := [c for c in cells if c.kind == kind and effects[c] >= threshold]:
            yield min(able, key=lambda c: c.k)
