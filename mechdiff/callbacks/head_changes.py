"""What changed in a head itself: base's weights on tuned's own input, and grafts of one head's weights.

1. Own change is 0 for an unedited head and needs no alignment. Its effect on the number is known to first
   order for every head, and exactly for the largest: a graft with keys and values for this head alone.
2. A graft of weights shares keys and values with the head's group, whose other heads change with it.
3. The whole difference of a head's contribution between the two runs, with what it inherits from below,
   stands beside it: `head_inherited`, a difference of states and no change of the head.
4. The heads that are grafted are those that changed most, by the same prompts; heads drawn from the rest are
   the control (`random`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.head_cases import Cases
from mechdiff.callbacks.head_passes import effects
from mechdiff.callbacks.head_records import HeadRecords
from mechdiff.callbacks.head_tables import Tables, said
from mechdiff.errors import PairError
from mechdiff.functional.intervals import bootstrap_means
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.head_edges import Head
from mechdiff.interventions.head_grafts import group as sharing
from mechdiff.interventions.head_grafts import head_graft
from mechdiff.interventions.head_patching import own_change
from mechdiff.interventions.head_runs import Baseline, clean_states
from mechdiff.modules.base import estimated, missing
from mechdiff.pairs.loading import LoadedPair
from mechdiff.results import Record

Ratio = Callable[..., Record]
"""`CausalEvaluation.ratio`."""


class HeadChanges:
    """Measures the change of heads from weights.

    Args:
        records: Makes the records.
        pair: The models.
        track: Shows progress.
    """

    def __init__(
        self,
        records: HeadRecords,
        pair: LoadedPair,
        track: Callable[[Iterable[int], str], Iterable[int]],
    ) -> None:
        self.records, self.pair, self.track = records, pair, track
        self.cases: Cases = records.cases
        self.tables: Tables = records.tables

    def every(self) -> Iterator[Record]:
        """Yield size and first-order effect of every head's change, its own and what it inherits."""
        if self.tables.foreign is not None:
            about = self.records.about("own_change", "weights")
            yield missing(
                "head_own_change",
                self.tables.foreign,
                {**about, "n": len(self.cases.prompts), "unit": "fraction"},
            )
            return
        for kind, quantity, method, name in (
            ("own", "head_own_change", "own_change", "weights"),
            ("inherited", "head_inherited", "state_difference", "other_model"),
        ):
            norms = self.tables.norms[kind]
            more: dict[str, Any] = {"kind": kind, "metric": "norm", "unit": "fraction"}
            yield from self.records.per_head(norms, quantity, method, name, "pair", **more)
            table = self.tables.attribution[("tuned", name)]
            yield from self.records.per_head(table, quantity, "attribution_patching", name, "pair", kind=kind)

    def largest(self, top: int, drawn: int) -> dict[int, str]:
        """Return the columns of the heads that changed most, and of others, with the group of each."""
        order = self.tables.norms["own"].mean(0).argsort(descending=True, stable=True).tolist()
        rest = torch.tensor(order[top:], dtype=torch.long)
        picks = torch.randperm(len(rest), generator=self.records.draws("grafts"))[:drawn]
        return dict.fromkeys(order[:top], "own_change") | dict.fromkeys(
            sorted(rest[picks].tolist()), "random"
        )

    def exact(self, columns: Mapping[int, str], steps: Sequence[int]) -> Iterator[Record]:
        """Yield the exact effect of some heads' own change on the number.

        Args:
            columns: Which heads, with the group of each.
            steps: Prompts, by index.
        """
        heads, rows = [self.tables.names()[i] for i in columns], []
        for index in self.track(steps, "own change"):
            case = self.cases.case("tuned", index)
            states = clean_states(case.side.loaded.model, case.prompt)
            changed = own_change(case.side.engine, self.pair.base.model, case.prompt, states)
            given = Baseline(case.widened(changed.z or {}), changed.weights, case.inner)
            rows.append(effects(case, given, heads))
        means = bootstrap_means(torch.stack(rows), generator=self.records.draws("own exact"))
        for place, (head, group) in enumerate(zip(heads, columns.values(), strict=True)):
            about = self.records.about("patch", "weights", said(head), kind="own", group=group)
            about |= {"model": "pair", "control": _control(group)}
            yield estimated("head_own_change", means.at(place), about)

    def grafts(self, columns: Mapping[int, str], steps: Sequence[int], ratio: Ratio) -> Iterator[Record]:
        """Yield how far base's weights of one head make tuned say what base says.

        Args:
            columns: Which heads, with the group of each.
            steps: Prompts, by index.
            ratio: Makes the record of 1 − a ratio of means.
        """
        heads = [self.tables.names()[i] for i in columns]
        about = self.records.about("graft", "weights", metric="recovery")
        rows, noise = [], []
        try:
            for index in self.track(steps, "grafts"):
                row, off = self._grafted(index, heads)
                rows.append(row)
                noise.append(off)
        except PairError:
            yield missing(
                "graft_recovery", "packed_projections", {**about, "n": len(steps), "unit": "fraction"}
            )
            return
        table, floor = torch.stack(rows), sum(noise) / len(noise)
        tuned = self.pair.tuned.model
        for place, (head, group) in enumerate(zip(heads, columns.values(), strict=True)):
            shared = [said((head[0], h)) for h in sharing(tuned, head[1])]
            params = {
                "metric": "recovery",
                "direction": "base_into_tuned",
                "shares_kv": shared,
                "group": group,
            }
            cell = {**self.records.about("graft", "weights", said(head), **params), "unit": "fraction"}
            cell["control"] = _control(group)
            yield ratio(table[:, 1 + place], table[:, 0], floor, "graft_recovery", **cell)

    def _grafted(self, index: int, heads: Sequence[Head]) -> tuple[Tensor, float]:
        """Return nats from base of tuned as it is and with each graft, and the noise of the first."""
        side, base = self.cases.sides["tuned"], self.cases.sides["base"]
        model, ids = side.loaded.model, side.ids(index)
        prompt = self.cases.case("tuned", index).prompt
        states = clean_states(model, prompt)
        reference = self.cases.log_p["base"][index]
        assert base.shared.shape == side.shared.shape
        found = [float(kl_divergence(reference, side.restricted(states.logits)[0].cpu()))]
        for layer, head in heads:
            with head_graft(model, self.pair.base.model, layer, head):
                if layer == 0:
                    logits = prompt.run(model)
                else:
                    logits = side.engine.resume(layer - 1, states.hidden[layer], ids)
            found.append(float(kl_divergence(reference, side.restricted(logits)[0].cpu())))
        again = float(kl_divergence(reference, self.cases.log_p["tuned"][index]))
        return torch.tensor(found, dtype=torch.float64), abs(again - found[0])


def _control(group: str) -> str:
    return "random" if group == "random" else "none"
