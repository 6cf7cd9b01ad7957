"""Turn tables of heads into records: attribution, churn with its nulls, likeness of rankings.

Every record says how it was measured: `method`, `metric`, `baseline`. What one head has carries its name,
`head`, and the site of its layer. Positions are `all` those where heads count, inside the prompt only
(`mechdiff.callbacks.head_cases`); a graft of weights alone acts at every token. See
`mechdiff.functional.churn` for the rules of churn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mechdiff.callbacks.head_cases import Cases
from mechdiff.callbacks.head_tables import ROLES, Tables, said
from mechdiff.config import HEAD_ABS_DELTA_NAT, HEAD_ABS_DELTA_PP, HEAD_Z, RBO_PERSISTENCE
from mechdiff.functional.churn import (
    NullShares,
    churn_shares,
    head_churn,
    split_half_shares,
    split_halves,
    swapped_shares,
)
from mechdiff.functional.cumulative import SHARES, concentration
from mechdiff.functional.intervals import bootstrap_means
from mechdiff.functional.overlap import (
    chance_jaccard,
    chance_overlap,
    chance_rbo,
    jaccard,
    ranking_agreement,
    rbo,
    topk_overlap,
)
from mechdiff.functional.permutation import FEWEST, random_signs
from mechdiff.functional.stats import Interval, generator
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import estimated, missing
from mechdiff.results import Record

TOP = (5, 10, 20, 32)
LEVEL_P = 0.05
NULL_DRAWS = 100
CURVE = 12
"""Floors of the curve of churn, evenly in logarithm from a hundredth of the largest mean difference to it."""


class HeadRecords:
    """Makes the records of a run on heads.

    Args:
        cases: The prompts.
        tables: What was measured.
        seed: Seed of resampling.
        nulls: Draws of swapped labels and of halves.
    """

    def __init__(self, cases: Cases, tables: Tables, seed: int, nulls: int = NULL_DRAWS) -> None:
        self.cases, self.tables, self.seed, self.nulls = cases, tables, seed, nulls

    @property
    def unit(self) -> str:
        """Unit of the number that is read."""
        return "pp" if self.cases.metric == "refusal" else "nats"

    def about(self, method: str, baseline: str, head: str | None = None, **params: Any) -> dict[str, Any]:
        """Return the attributes that records of one kind of measurement have in common."""
        named = {} if head is None else {"head": head}
        about: dict[str, Any] = {
            "question": "rq4",
            "split": "eval",
            "positions": "all",
            "unit": self.unit,
            "flags": self.tables.flags,
            "params": {
                "method": method,
                "metric": self.cases.metric,
                "baseline": baseline,
                **named,
                **params,
            },
        }
        if head is not None:
            about["site"] = site(head)
        return about

    def attributions(self, baseline: str) -> Iterator[Record]:
        """Yield the attribution of every head in each model, and the difference of the two."""
        method = "grad_x_act" if baseline == "zero" else "attribution_patching"
        found = {role: self.tables.attribution.get((role, baseline)) for role in ROLES}
        base, tuned = (found[role] for role in ROLES)
        across = baseline in ("other_model", "weights")  # what stands against a head differs between models
        if base is not None and tuned is not None and self.tables.apart is None and not across:
            yield from self.per_head(tuned - base, "head_attribution", method, baseline, "pair")
        for role, table in found.items():
            if table is not None:
                yield from self.per_head(table, "head_attribution", method, baseline, role)

    def per_head(
        self, table: Tensor, quantity: str, method: str, baseline: str, model: str, **more: Any
    ) -> Iterator[Record]:
        """Yield the mean of every head over prompts.

        Args:
            table: `(prompts, heads)`.
            quantity: What was measured.
            method: How.
            baseline: Against what.
            model: Of which model.
            **more: Further parameters; `unit` is the unit.
        """
        unit = more.pop("unit", self.unit)
        means = bootstrap_means(table, generator=self.draws(quantity, model, baseline))
        for i, head in enumerate(self.tables.names("tuned" if model == "pair" else model)):
            about = self.about(method, baseline, said(head), **more)
            yield estimated(quantity, means.at(i), {**about, "model": model, "unit": unit})

    def chosen(
        self, table: Tensor, names: Sequence[str], method: str, baseline: str, model: str
    ) -> Iterator[Record]:
        """Yield the mean of some heads over prompts, `(prompts, heads)`."""
        means = bootstrap_means(table, generator=self.draws("chosen", method, baseline, model))
        for i, name in enumerate(names):
            about = self.about(method, baseline, name, group="attribution")
            yield estimated("head_attribution", means.at(i), {**about, "model": model})

    def per_edge(self, table: Tensor, names: Sequence[str], baseline: str, model: str) -> Iterator[Record]:
        """Yield the mean of every edge over prompts, `(prompts, edges)`."""
        means = bootstrap_means(table, generator=self.draws("edges", model))
        for i, name in enumerate(names):
            about = self.about("attribution_patching", baseline, of="edges", edge=name)
            yield estimated("head_attribution", means.at(i), {**about, "model": model})

    def judged(
        self,
        base: Tensor,
        tuned: Tensor,
        baseline: str,
        names: Sequence[str],
        of: str,
        method: str = "attribution_patching",
        group: str | None = None,
    ) -> Iterator[Record]:
        """Yield churn, its nulls and its tests, of heads or edges.

        Args:
            base: Attributions in base, `(prompts, columns)`.
            tuned: The same in tuned.
            baseline: What they stand against.
            names: Name of each column.
            of: `heads` or `edges`.
            method: How they were measured.
            group: How the columns were selected, where they are not all: a share is then of these `rows`.
        """
        params = {} if of == "heads" else {"of": of}
        about = self.about(method, baseline, **params)
        if group is not None:
            about = {**with_params(about, group=group), "rows": len(names)}
        n = len(base)
        if n < FEWEST:
            for quantity in ("churn", "churn_p", "churn_bh"):
                yield missing(quantity, "too_few_prompts", {**about, "n": n, "unit": "fraction"})
            return
        draws, d = self.draws("churn", of), tuned - base
        found = head_churn(base, tuned, generator=draws)
        for i, name in enumerate(names):
            where = {"site": site(name)} if of == "heads" else {}
            own = {**about, **where, "params": {**about["params"], "head" if of == "heads" else "edge": name}}
            yield Record(quantity="churn_p", value=found.p_max[i].item(), n=n, **{**own, "unit": "p"})
        yield from self._shares(d, {"base": base, "tuned": tuned}, found.floor, about)
        for quantity, p in (("churn_bh", found.p_bh), ("churn_p", found.p_max)):
            passed = {**about, "params": {**about["params"], "level": LEVEL_P}, "unit": "fraction"}
            yield Record(quantity=quantity, value=(p <= LEVEL_P).double().mean().item(), n=n, **passed)
        yield from self._concentration(d, about)

    def rankings(self, base: Tensor, tuned: Tensor, baseline: str) -> Iterator[Record]:
        """Yield how alike the rankings of the two models are, by chance, and between halves of the prompts.

        The two models answer the same prompts, of which they share the noise, and all of them. Halves are
        compared at equal terms: base on one with base on the other (the control of model ``base``), and base
        on one with tuned on the other (of the ``pair``).
        """
        count = base.shape[1]
        ks = [k for k in TOP if k <= count]
        about = {**self.about("attribution_patching", baseline), "unit": "fraction"}
        found = ranking_agreement(base, tuned, ks, generator=self.draws("rankings"))
        half = self._halves(base, tuned, ks)
        by_chance = {"topk_overlap": chance_overlap, "jaccard": chance_jaccard}
        for quantity, values in (("topk_overlap", found.overlap), ("jaccard", found.jaccard)):
            for i, k in enumerate(ks):
                cell = with_params(about, k=k)
                yield estimated(quantity, values.at(i), cell)
                level = by_chance[quantity](count, k)._replace(n=len(base))
                yield estimated(quantity, level, {**cell, "control": "chance"})
                yield from self._half(quantity, half, k, cell, len(base) // 2)
        cell = with_params(about, persistence=RBO_PERSISTENCE)
        yield estimated("rbo", found.rbo.at(0), cell)
        yield Record(quantity="rbo", value=chance_rbo(count), n=len(base), **{**cell, "control": "chance"})
        yield from self._half("rbo", half, 0, cell, len(base) // 2)

    def draws(self, *names: object) -> torch.Generator:
        """Return a generator of its own for something."""
        return generator(self.seed, "heads", *names)

    def _shares(
        self, d: Tensor, models: dict[str, Tensor], swap_floor: float, about: dict[str, Any]
    ) -> Iterator[Record]:
        """Yield the share of churned heads for every floor, beside what it is where nothing differs."""
        largest = d.mean(0).abs().max().item()
        curve = torch.logspace(-2, 0, CURVE, dtype=torch.float64) * largest if largest > 0 else torch.zeros(0)
        floor = HEAD_ABS_DELTA_PP if self.unit == "pp" else HEAD_ABS_DELTA_NAT
        rules: list[dict[str, Any]] = [
            {"rule": "bound", "floor": floor, "floor_from": "seed"},
            {"rule": "bound", "floor": swap_floor, "floor_from": "label_swap"},
            *({"rule": "bound", "floor": x, "floor_from": "curve"} for x in curve.tolist()),
            {"rule": "z", "floor": HEAD_Z},
        ]
        floors = [rule["floor"] for rule in rules[:-1]]
        found = churn_shares(d, floors, generator=self.draws("shares"))
        swapped = swapped_shares(d, floors, generator=self.draws("swapped"), draws=self.nulls)
        halves = {
            role: split_half_shares(x, floors, generator=self.draws("split", role), draws=self.nulls)
            for role, x in models.items()
        }
        for i, rule in enumerate(rules):
            flags = (*about["flags"], "grows_with_n") if rule["rule"] == "z" else about["flags"]
            cell = {**with_params(about, **rule), "flags": flags, "unit": "fraction"}
            yield estimated("churn", found.at(i), cell)
            yield _null("churn", swapped, i, len(d), {**cell, "control": "label_swap"})
            for role, null in halves.items():
                yield _null("churn", null, i, len(d), {**cell, "control": "split_half", "model": role})

    def _concentration(self, d: Tensor, about: dict[str, Any]) -> Iterator[Record]:
        """Yield how many heads hold half and four fifths of the change, and how many do by chance."""
        about = {**about, "unit": "heads"}
        found = concentration(d, SHARES, generator=self.draws("concentration"))
        signs = random_signs(self.nulls, len(d), self.draws("concentration", "swapped"))
        swapped = torch.stack([_holding((d * sign[:, None]).mean(0)) for sign in signs])
        for i, share in enumerate(SHARES):
            yield estimated("concentration", found.at(i), with_params(about, share=share))
            low, high = (swapped[:, i].quantile(q).item() for q in (0.05, 0.95))
            null = Interval(swapped[:, i].mean().item(), low, high, len(d))
            cell = {**with_params(about, share=share, draws=self.nulls), "control": "label_swap"}
            yield estimated("concentration", null, cell)

    def _halves(
        self, base: Tensor, tuned: Tensor, ks: Sequence[int]
    ) -> dict[tuple[str, int, str], list[float]]:
        """Compare rankings of random halves, by quantity, k and model: ``base`` with itself, or the pair."""
        half: dict[tuple[str, int, str], list[float]] = {}
        draws, both = self.draws("halves"), torch.cat([base, tuned], 1)
        for _ in range(self.nulls if len(base) >= 4 else 0):
            first, second = (part.mean(0) for part in split_halves(both, draws))
            one, (other, theirs) = first[: base.shape[1]], second.split(base.shape[1])
            for model, x in (("base", other), ("pair", theirs)):
                for k in ks:
                    half.setdefault(("topk_overlap", k, model), []).append(topk_overlap(one, x, k).item())
                    half.setdefault(("jaccard", k, model), []).append(jaccard(one, x, k).item())
                half.setdefault(("rbo", 0, model), []).append(rbo(one, x).item())
        return half

    def _half(
        self,
        quantity: str,
        halves: dict[tuple[str, int, str], list[float]],
        k: int,
        about: dict[str, Any],
        n: int,
    ) -> Iterator[Record]:
        for model in ("base", "pair"):
            if values := halves.get((quantity, k, model)):
                x = torch.tensor(values, dtype=torch.float64)
                low, high = (x.quantile(q).item() for q in (0.05, 0.95))
                cell = {**with_params(about, draws=len(values)), "control": "split_half", "model": model}
                yield estimated(quantity, Interval(x.mean().item(), low, high, n), cell)


def site(head: str) -> str:
    """Return the site of a head by its name."""
    return str(Site(int(head.partition(".")[0]), "head_out"))


def _holding(means: Tensor) -> Tensor:
    """Count the largest heads that hold each of `SHARES` of the summed size."""
    sizes = means.abs().sort(descending=True).values.cumsum(0)
    if not sizes[-1] > 0:
        return torch.zeros(len(SHARES), dtype=torch.float64)
    wanted = torch.tensor(SHARES, dtype=torch.float64) * sizes[-1] * (1 - 1e-12)
    return (torch.searchsorted(sizes, wanted) + 1).double()


def with_params(about: dict[str, Any], **params: Any) -> dict[str, Any]:
    """Add parameters to the attributes of a record."""
    return {**about, "params": {**about["params"], **params}}


def _null(quantity: str, found: NullShares, index: int, n: int, about: dict[str, Any]) -> Record:
    value, low, high = (part[index].item() for part in (found.mean, found.low, found.high))
    return estimated(quantity, Interval(value, low, high, n), with_params(about, draws=found.draws))
