"""Exchange heads exactly: the truth beside estimates, and what the highest heads do together.

1. The heads with the largest mean attribution and as many drawn from the rest are exchanged one at a time.
   Agreement with the attribution is a correlation over these heads and the overlap of their top ranks; among
   heads chosen by attribution alone it would be flattered, so it stands beside that among the drawn ones.
   Ranks are `among` the heads that were exchanged, both groups together, not among all heads of the model.
2. Heads of tuned give way to base's contribution, k of them together. What is read is KL(base ‖ patched
   tuned), whose gap has one sign on every prompt, and the order is that of its attribution on prompts that
   are not run here, where there are enough; orders at random are the control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mechdiff.callbacks.head_cases import LEAST, Case, Cases
from mechdiff.callbacks.head_passes import effects, joint_scores
from mechdiff.callbacks.head_records import HeadRecords, with_params
from mechdiff.callbacks.head_tables import Tables, baselines, placed, said
from mechdiff.errors import FitError
from mechdiff.functional.cumulative import cumulative, grid_counts, random_order
from mechdiff.functional.intervals import bootstrap_means
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.overlap import chance_overlap, correlation_of_means, ranking_agreement
from mechdiff.functional.stats import Interval, bootstrap_ratio, measurable
from mechdiff.interventions.attribution import attribute
from mechdiff.interventions.head_edges import Head
from mechdiff.interventions.head_runs import Baseline, clean_states
from mechdiff.modules.base import estimated, missing
from mechdiff.results import Record

TOP_OVERLAP = 20
RANKED = 12
"""Most prompts from which the order of heads is taken."""
_LEAST_HEADS = 3


class HeadTruth:
    """Runs exchanges of heads and compares them with attributions.

    Args:
        records: Makes the records.
        means: The `mean` baseline of each model.
        track: Shows progress.
    """

    def __init__(
        self,
        records: HeadRecords,
        means: dict[str, Baseline],
        track: Callable[[Iterable[int], str], Iterable[int]],
    ) -> None:
        self.records, self.means, self.track = records, means, track
        self.cases: Cases = records.cases
        self.tables: Tables = records.tables

    def baseline(self, case: Case, role: str, name: str) -> Baseline:
        """Return what stands against heads, by name."""
        if name != "other_model":
            return baselines(self.cases, case, role, self.means[role])[name]
        donor = self.cases.case("base" if role == "tuned" else "tuned", case.index)
        states = clean_states(donor.side.loaded.model, donor.prompt)
        return self.cases.across(case, role, states.z)

    def choose(self, table: Tensor, top: int, drawn: int, *names: object) -> dict[str, list[int]]:
        """Return the columns with the largest means, and others.

        Args:
            table: `(prompts, heads)`.
            top: Number of the largest.
            drawn: Number of others.
            *names: What they are drawn for.
        """
        order = table.mean(0).abs().argsort(descending=True, stable=True).tolist()
        rest = torch.tensor(order[top:], dtype=torch.long)
        picks = torch.randperm(len(rest), generator=self.records.draws("drawn", *names))[:drawn]
        return {"attribution": order[:top], "random": sorted(rest[picks].tolist())}

    def single(self, role: str, name: str, steps: Sequence[int], top: int, drawn: int) -> Iterator[Record]:
        """Yield exact effects of single heads and their agreement with attribution.

        Args:
            role: Model that is patched.
            name: Baseline.
            steps: Prompts, by index.
            top: Heads with the largest attribution.
            drawn: Heads drawn from the rest.
        """
        table = self.tables.attribution.get((role, name))
        if table is None:
            about = {**self.records.about("patch", name), "model": role, "unit": "correlation"}
            yield missing("truth_r", self.tables.apart or "not_measured", {**about, "n": len(steps)})
            return
        groups = self.choose(table, top, drawn, role, name)
        columns = [i for part in groups.values() for i in part]
        heads = [self.tables.names(role)[i] for i in columns]
        exact = self.run(role, name, steps, heads)
        means = bootstrap_means(exact, generator=self.records.draws("patch", role, name))
        member = {i: group for group, part in groups.items() for i in part}
        for place, (column, head) in enumerate(zip(columns, heads, strict=True)):
            about = self.records.about("patch", name, said(head), group=member[column])
            yield estimated("head_attribution", means.at(place), {**about, "model": role})
        guess = table[list(steps)][:, columns]
        method = "grad_x_act" if name == "zero" else "attribution_patching"
        means = bootstrap_means(guess, generator=self.records.draws("patched", role, name))
        for place, head in enumerate(heads):
            about = self.records.about(method, name, said(head), subset="patched")
            yield estimated("head_attribution", means.at(place), {**about, "model": role})
        about = {**self.records.about("patch", name), "model": role}
        for group in ("all", *groups):
            picked = [p for p, c in enumerate(columns) if group in ("all", member[c])]
            cell = with_params({**about, "unit": "correlation", "rows": len(picked)}, group=group)
            if len(picked) < _LEAST_HEADS:
                yield missing("truth_r", "too_few_heads", {**cell, "n": len(steps)})
                continue
            try:
                r = correlation_of_means(
                    guess[:, picked], exact[:, picked], generator=self.records.draws("r", role, name, group)
                )
            except FitError:
                yield missing("truth_r", "no_variance", {**cell, "n": len(steps)})
            else:
                yield estimated("truth_r", r, cell)
        k = min(TOP_OVERLAP, max(1, len(columns) // 2))
        found = ranking_agreement(guess, exact, [k], generator=self.records.draws("overlap", role, name))
        cell = with_params({**about, "unit": "fraction", "rows": len(columns)}, k=k, among=len(columns))
        yield estimated("truth_overlap", found.overlap.at(0), cell)
        by_chance = chance_overlap(len(columns), k)._replace(n=len(steps))
        yield estimated("truth_overlap", by_chance, {**cell, "control": "chance"})

    def run(self, role: str, name: str, steps: Sequence[int], heads: Sequence[Head]) -> Tensor:
        """Return exact effects, `(prompts, heads)`."""
        rows = []
        for index in self.track(steps, f"heads: {name} into {role}"):
            case = self.cases.case(role, index)
            rows.append(effects(case, self.baseline(case, role, name), heads))
        return torch.stack(rows)

    def together(self, steps: Sequence[int], orders: int) -> Iterator[Record]:
        """Yield the effect of the highest heads together, in order and at random.

        Args:
            steps: Prompts, by index.
            orders: Number of random orders.
        """
        cases = replace(self.cases, metric="kl_other", graded=[])
        others = [i for i in range(len(cases.prompts)) if i not in set(steps)]
        apart = len(others) >= LEAST
        ranking = others[:: -(-len(others) // RANKED)] if apart else steps
        table = []
        for index in self.track(ranking, "order of heads"):
            case = cases.case("tuned", index)
            donor = {"it": self.baseline(case, "tuned", "other_model")}
            done = attribute(case.side.loaded.model, placed(case), case.score, donor)
            table.append(done.values["it"].sum(0).flatten())
        order = torch.stack(table).mean(0).abs().argsort(descending=True, stable=True)
        count, layers = len(order), self.tables.layers["tuned"]
        ks = grid_counts(count)
        draws = self.records.draws("orders")
        every = [order, *(torch.randperm(count, generator=draws) for _ in range(orders))]
        sets = torch.zeros(len(every) * (len(ks) - 1) + 2, count, dtype=torch.bool)
        sets[-1] = True  # all heads, the same in every order; before it none
        for row, (chosen, k) in enumerate((o, k) for o in every for k in ks[:-1]):
            sets[row, chosen[:k]] = True
        rows = []
        for index in self.track(steps, "heads together"):
            case = cases.case("tuned", index)
            given = self.baseline(case, "tuned", "other_model")
            rows.append(joint_scores(case, given, sets.unflatten(1, (len(layers), -1)), layers))
        scores = torch.stack(rows)  # (prompts, sets)
        whole = scores[:, -1:]
        curves = scores[:, :-2].unflatten(1, (len(every), -1))
        curves = torch.cat([curves, whole[:, None].expand(-1, len(every), -1)], 2)  # (prompts, orders, ks)
        flags = () if apart else ("ranked_on_the_same_prompts",)
        base, tuned = (cases.log_p[role][list(steps)].double() for role in ("base", "tuned"))
        noise = (scores[:, -2] - kl_divergence(base, tuned)).abs().mean().item()
        yield from self._curves(scores[:, -2], curves, ks, noise, flags)

    def _curves(
        self,
        none: Tensor,
        curves: Tensor,
        ks: Sequence[int],
        noise: float,
        flags: tuple[str, ...],
    ) -> Iterator[Record]:
        about = with_params(self.records.about("patch", "other_model"), metric="kl_other")
        about |= {"unit": "fraction", "model": "tuned", "flags": (*about["flags"], *flags)}
        count, n = ks[-1], len(curves)
        effect = bootstrap_means((none - curves[:, 0, -1])[:, None], generator=self.records.draws("gap")).at(
            0
        )
        cell = with_params({**about, "unit": "nats"}, k=count, of="effect")
        yield estimated("cumulative_effect", effect, cell)
        if not measurable(_size(effect), noise):
            for k in ks:
                cell = with_params({**about, "n": n}, k=k, of="all_heads")
                yield missing("cumulative_effect", "gap_too_small", cell)
            for quantity in ("cpr", "cmd"):
                yield missing(quantity, "gap_too_small", {**about, "n": n})
            return
        found = cumulative(none, curves[:, 0], ks, generator=self.records.draws("cumulative"))
        for i, k in enumerate(ks):
            yield estimated("cumulative_effect", found.curve.at(i), with_params(about, k=k, of="all_heads"))
        yield estimated("cpr", found.cpr, about)
        yield estimated("cmd", found.cmd, about)
        if curves.shape[1] > 1:
            curve, area = random_order(none, curves[:, 1:].movedim(1, 0), ks)
            control = {**with_params(about, draws=curves.shape[1] - 1), "control": "random"}
            for i, k in enumerate(ks):
                yield estimated("cumulative_effect", curve.at(i), with_params(control, k=k, of="all_heads"))
            yield estimated("cpr", area.at(0), control)
            yield estimated("cmd", area.at(1), control)
        cell = with_params(about, k=count, of="gap")
        whole = bootstrap_means(none[:, None], generator=self.records.draws("full gap")).at(0)
        if measurable(whole, noise):
            share = bootstrap_ratio(
                none - curves[:, 0, -1], none, generator=self.records.draws("share of the gap")
            )
            yield estimated("cumulative_effect", share, cell)
        else:
            yield missing("cumulative_effect", "gap_too_small", {**cell, "n": n})


def _size(gap: Interval) -> Interval:
    """Return a gap counted in its own direction."""
    return gap if gap.value >= 0 else Interval(-gap.value, -gap.high, -gap.low, gap.n)
