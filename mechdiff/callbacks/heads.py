"""Heads: which attention heads were rewired?

1. Every head's attribution to one number per prompt in each model, against several baselines; the difference
   of the two models is judged against floors and nulls (`mechdiff.functional.churn`).
2. What changed in the head itself: own change and grafts (`mechdiff.callbacks.head_changes`).
3. Integrated gradients on a few prompts, with the share of the number that each layer misses.
4. Exact exchanges beside the estimates, alone and together (`mechdiff.callbacks.head_truth`).
5. The edges among the highest heads and the logits, and their churn.

Heads count at tokens of the prompt alone, not at those of an answer whose probability is read.
Attributions say what a head does for the number in its own model. Only exchanges are effects, and only grafts
and own changes are due to the head's weights; a state patch inherits everything upstream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mechdiff.callbacks.base import CausalEvaluation, Item
from mechdiff.callbacks.graded import read_openings
from mechdiff.callbacks.head_cases import LEAST, METRICS, Cases, find_cases
from mechdiff.callbacks.head_changes import HeadChanges
from mechdiff.callbacks.head_contrast import check_run, contrasted
from mechdiff.callbacks.head_passes import effects, integrated
from mechdiff.callbacks.head_records import NULL_DRAWS, HeadRecords
from mechdiff.callbacks.head_refusals import refusal_churn
from mechdiff.callbacks.head_tables import (
    ROLES,
    Tables,
    baselines,
    begin,
    edge_tables,
    means_of,
    measure,
    said,
)
from mechdiff.callbacks.head_truth import HeadTruth
from mechdiff.data.prompts import Prompt, spread
from mechdiff.errors import ConfigError
from mechdiff.functional.attribution import COMPLETENESS_LIMIT
from mechdiff.functional.metrics import kl_divergence
from mechdiff.interventions.head_runs import Baseline, clean_states
from mechdiff.interventions.sites import Site
from mechdiff.modules.base import DiffModule, missing
from mechdiff.pairs.loading import LoadedPair
from mechdiff.pairs.spec import FilePath
from mechdiff.results import Record

EXCHANGES = ("tuned/other_model", "base/other_model", "tuned/zero", "tuned/mean")


class Heads(CausalEvaluation):
    """Attributes, grafts and exchanges attention heads.

    Args:
        metric: The number read from the models, of ``METRICS``; by default log P(correct) for a cognitive
            pair with problems, else the difference of logits.
        max_prompts: Prompts whose heads are attributed; None takes all.
        exchanges: Further exact exchanges, ``<model patched>/<baseline>``, some of ``EXCHANGES``.
        truth_prompts: Prompts on which single heads of tuned are exchanged for those of the counterfactual,
            the truth beside the main attribution; 0 leaves this out.
        exact_prompts: Prompts of the other exact exchanges; 0 leaves them out.
        top: Heads with the largest attribution that are exchanged.
        drawn: Heads drawn from the rest.
        steps: Nodes of integrated gradients.
        integrated_prompts: Prompts of integrated gradients; 0 leaves them out.
        grafted: Heads with the largest own change whose weights are grafted, with half as many others.
        graft_prompts: Prompts of grafts; 0 leaves them out.
        together_prompts: Prompts on which heads are exchanged together; 0 leaves this out.
        orders: Random orders of heads, the control of the order by attribution.
        edge_heads: Heads whose edges are attributed.
        edge_prompts: Prompts of edges; 0 leaves them out.
        nulls: Draws of swapped labels and of halves of one model's prompts.
        refusal_heads: Heads whose exact effect on the probability of refusing is compared.
        refusal_prompts: Prompts of that; 0 leaves it out.
        contrast: Folder of an earlier run on another pair, whose churn is subtracted from this one's.

    Raises:
        ConfigError: If a name is unknown or a number out of range.
    """

    def __init__(
        self,
        metric: str | None = None,
        max_prompts: int | None = 40,
        exchanges: Sequence[str] = EXCHANGES,
        truth_prompts: int = 32,
        exact_prompts: int = 8,
        top: int = 32,
        drawn: int = 32,
        steps: int = 6,
        integrated_prompts: int = 2,
        grafted: int = 16,
        graft_prompts: int = 8,
        together_prompts: int = 6,
        orders: int = 20,
        edge_heads: int = 20,
        edge_prompts: int = 16,
        nulls: int = NULL_DRAWS,
        refusal_heads: int = 6,
        refusal_prompts: int = 0,
        contrast: FilePath | None = None,
    ) -> None:
        super().__init__()
        if metric is not None and metric not in METRICS:
            raise ConfigError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}, null (key: metric)")
        if unknown := sorted(set(exchanges) - set(EXCHANGES)):
            raise ConfigError(
                f"exchanges has {unknown[0]!r}; allowed: {', '.join(EXCHANGES)} (key: exchanges)"
            )
        counts = {
            "truth_prompts": truth_prompts,
            "exact_prompts": exact_prompts,
            "integrated_prompts": integrated_prompts,
            "graft_prompts": graft_prompts,
            "together_prompts": together_prompts,
            "edge_prompts": edge_prompts,
            "refusal_prompts": refusal_prompts,
        }
        for name, value in counts.items():
            if value != 0 and value < LEAST:
                raise ConfigError(f"{name} is {value}; allowed: 0, or {LEAST} and more (key: {name})")
        for name, value in {"drawn": drawn, "orders": orders}.items():
            if value < 0:
                raise ConfigError(f"{name} is {value}; allowed: 0 or more (key: {name})")
        sizes = {"top": top, "steps": steps, "grafted": grafted, "edge_heads": edge_heads}
        sizes |= {"refusal_heads": refusal_heads, "nulls": nulls}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more (key: {name})")
        self.metric, self.max_prompts, self.exchanges = metric, max_prompts, tuple(exchanges)
        self.truth_prompts, self.exact_prompts = truth_prompts, exact_prompts
        self.top, self.drawn = top, drawn
        self.steps, self.integrated_prompts = steps, integrated_prompts
        self.grafted, self.graft_prompts = grafted, graft_prompts
        self.together_prompts, self.orders = together_prompts, orders
        self.edge_heads, self.edge_prompts = edge_heads, edge_prompts
        self.nulls, self.refusal_heads, self.refusal_prompts = nulls, refusal_heads, refusal_prompts
        self.contrast = None if contrast is None else check_run(contrast)

    def evaluate(self, module: DiffModule, pair: LoadedPair, prompts: Sequence[Prompt]) -> Iterable[Record]:
        """Measure every head; nothing fitted is used."""
        cases = find_cases(pair, prompts, self.metric, self.max_prompts)
        tables, means = begin(cases, pair), means_of(cases)
        measure(cases, tables, means, self.track(range(len(cases.prompts)), "heads"), pair)
        if not self._differ(cases):
            tables.apart = tables.apart or "gap_too_small"
        records = HeadRecords(cases, tables, self.seed, self.nulls)
        self._keep(cases, tables)
        main = cases.counterfactual
        for name in (main, "zero", "mean", "other_model"):
            yield from records.attributions(name)
        if tables.apart is not None:
            about = {**records.about("attribution_patching", main), "unit": "fraction"}
            yield missing("churn", tables.apart, {**about, "n": len(cases.prompts)})
        else:
            base, tuned = (tables.attribution[role, main] for role in ROLES)
            yield from records.judged(base, tuned, main, [said(h) for h in tables.names()], "heads")
            yield from records.rankings(base, tuned, main)
            if self.contrast is not None:
                yield from contrasted(records, pair.spec.name, self.contrast)
        yield from self._noise(cases, records)
        changes = HeadChanges(records, pair, self.track)
        yield from changes.every()
        if tables.foreign is None and self.graft_prompts:
            columns, few = (
                changes.largest(self.grafted, self.grafted // 2),
                self._few(cases, self.graft_prompts),
            )
            yield from changes.exact(columns, few)
            yield from changes.grafts(columns, few, self.ratio)
        if self.integrated_prompts:
            yield from self._integrated(cases, records, means)
        truth = HeadTruth(records, means, self.track)
        for place in (f"tuned/{main}", *self.exchanges):
            role, _, name = place.partition("/")
            if most := self.truth_prompts if name == main else self.exact_prompts:
                yield from truth.single(role, name, self._few(cases, most), self.top, self.drawn)
        if self.together_prompts and tables.apart is None:
            yield from truth.together(self._few(cases, self.together_prompts), self.orders)
        if self.edge_prompts:
            yield from self._edges(cases, records)
        if self.refusal_prompts and pair.spec.openings and tables.apart is None:
            openings, few = read_openings(Path(pair.spec.openings)), self._few(cases, self.refusal_prompts)
            yield from refusal_churn(records, openings, few, self.refusal_heads, self.track)

    def _differ(self, cases: Cases) -> bool:
        """Say whether the models differ by more than rounding; where they are equal, no change is a fact."""
        nats = kl_divergence(cases.log_p["base"], cases.log_p["tuned"])
        return not nats.any() or self.gap(nats, 0.0, {"positions": "last"})

    def _integrated(self, cases: Cases, records: HeadRecords, means: dict[str, Baseline]) -> Iterator[Record]:
        """Yield integrated gradients of every head, and the completeness error of every layer."""
        name, few = cases.counterfactual, self._few(cases, self.integrated_prompts)
        for role in ROLES:
            layers, rows, sums = records.tables.layers[role], [], []
            for index in self.track(few, f"integrated gradients: {role}"):
                case = cases.case(role, index)
                given = baselines(cases, case, role, means[role])[name]
                values, ends = integrated(case, given, layers, self.steps)
                rows.append(values.flatten())
                sums.append(ends)
            table, ends = torch.stack(rows), torch.stack(sums)
            gaps = (ends[..., 1] - ends[..., 2]).abs()
            missed = (ends[..., 0] - (ends[..., 1] - ends[..., 2])).abs()
            errors = torch.where(missed.sum(0) == 0, 0.0, missed.sum(0) / gaps.sum(0))
            method = "integrated_gradients"
            yield from records.per_head(table, "head_attribution", method, name, role, steps=self.steps)
            for layer, error in zip(layers, errors.tolist(), strict=True):
                about = records.about("integrated_gradients", name, steps=self.steps)
                about |= {
                    "site": str(Site(layer, "head_out")),
                    "model": role,
                    "unit": "fraction",
                    "n": len(few),
                }
                if error > COMPLETENESS_LIMIT:
                    about["flags"] = (*about["flags"], "completeness_missed")
                if error == float("inf"):
                    yield Record(quantity="completeness_error", value=None, reason="no_difference", **about)
                else:
                    yield Record(quantity="completeness_error", value=error, **about)

    def _edges(self, cases: Cases, records: HeadRecords) -> Iterator[Record]:
        """Yield the attribution of edges in each model and their churn."""
        tables, name = records.tables, cases.counterfactual
        normed = "norm_after_attention" if "norm_after_attention" in tables.flags else None
        if reason := tables.apart or normed:
            about = {**records.about("attribution_patching", name, of="edges"), "unit": "fraction"}
            yield missing("churn", reason, {**about, "n": len(cases.prompts)})
            return
        size = torch.stack([tables.attribution[role, name].mean(0).abs() for role in ROLES]).sum(0)
        chosen = size.argsort(descending=True, stable=True)[: self.edge_heads].tolist()
        heads = [tables.names()[i] for i in chosen]
        few = self._few(cases, self.edge_prompts)
        found, names = edge_tables(cases, heads, self.track(few, "edges"))
        values: dict[str, Tensor] = {"pair": found["tuned"] - found["base"], **found}
        for model, table in values.items():
            yield from records.per_edge(table, names, name, model)
        yield from records.judged(found["base"], found["tuned"], name, names, "edges")

    def _noise(self, cases: Cases, records: HeadRecords) -> Iterator[Record]:
        """Yield what exchanging heads of base for themselves does: rounding, and nothing else."""
        case = cases.case("base", 0)
        z = clean_states(case.side.loaded.model, case.prompt).z
        own, heads = Baseline(case.widened(z), where=case.inner), records.tables.names("base")
        few, main = heads[:: max(1, len(heads) // 8)], cases.counterfactual
        about = {**records.about("self_patch", main), "control": "base_vs_base", "model": "base", "n": 1}
        value = effects(case, own, few).abs().max().item()
        yield Record(quantity="head_attribution", value=value, rows=len(few), **about)

    def _few(self, cases: Cases, most: int) -> list[int]:
        return [cases.prompts.index(p) for p in spread(cases.prompts, most)]

    def _keep(self, cases: Cases, tables: Tables) -> None:
        """Keep the main attribution of every prompt and head, from which pairs are contrasted."""
        name = cases.counterfactual
        for role in ROLES:
            for prompt, row in zip(cases.prompts, tables.attribution[role, name].tolist(), strict=True):
                for head, value in zip(tables.names(role), row, strict=True):
                    where = str(Site(head[0], "head_out"))
                    about = (where, "all", role, f"{cases.metric}/{name}/{said(head)}")
                    self.items.append(Item(prompt.id, "head_attribution", *about, value))
