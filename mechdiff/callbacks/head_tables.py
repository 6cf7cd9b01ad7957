"""Measure heads case by case: tables with a row per prompt and a column per head, layer by layer.

1. One backward pass per prompt and model serves all baselines: nothing (`zero`), the counterfactual prompt in
   the same model (`twin` or `resample`), the mean over prompts and positions (`mean`), the other model on the
   same prompt (`other_model`), and the other model's weights on this model's own input (`weights`).
2. Own change: how far a head's contribution moves when base's weights read tuned's own input. Inherited: how
   far it differs between the two runs, upstream differences included. Both as a share of what the layer's
   attention puts out, in means of norms over the counted positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mechdiff.callbacks.grafts import shared_rows
from mechdiff.callbacks.head_cases import Case, Cases
from mechdiff.errors import PairError
from mechdiff.interventions.attention import head_layers
from mechdiff.interventions.attribution import attribute
from mechdiff.interventions.grafts import check_same_architecture
from mechdiff.interventions.head_edges import Head, attribute_edges, edges_among
from mechdiff.interventions.head_patching import adds_up, head_changes, own_change
from mechdiff.interventions.head_runs import Baseline, Batch, States, clean_states
from mechdiff.interventions.hooks import head_weights
from mechdiff.pairs.loading import LoadedPair

ROLES = ("base", "tuned")
Key = tuple[str, str]
"""Role of a model and name of a baseline."""


@dataclass
class Tables:
    """What was measured of every head.

    Attributes:
        layers: Layers with softmax heads of each model.
        heads: Heads per layer of each model.
        attribution: By role and baseline, `(prompts, heads)`, float64.
        scores: The numbers themselves by role, `(prompts,)`.
        norms: Relative size of the change by kind (`own`, `inherited`), `(prompts, heads)`.
        flags: What must be said of every number.
        apart: Why the two models' heads cannot be compared, if so.
        foreign: Why base's weights cannot run inside tuned, if so.
    """

    layers: dict[str, list[int]]
    heads: dict[str, int]
    attribution: dict[Key, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    apart: str | None = None
    foreign: str | None = None

    def names(self, role: str = "tuned") -> list[Head]:
        """List the heads of a model in the order of the columns."""
        return [(layer, head) for layer in self.layers[role] for head in range(self.heads[role])]


def begin(cases: Cases, pair: LoadedPair) -> Tables:
    """Find out which heads there are and what can be compared.

    Args:
        cases: The prompts.
        pair: The models.
    """
    models = {role: side.loaded for role, side in cases.sides.items()}
    tables = Tables(
        {role: head_layers(m.model) for role, m in models.items()},
        {role: m.num_heads for role, m in models.items()},
    )
    if tables.names("base") != tables.names("tuned"):
        tables.apart = tables.foreign = "different_heads"
    else:
        try:
            rows = shared_rows(pair)
            check_same_architecture(pair.tuned.model, pair.base.model, None if rows is None else rows[::-1])
        except PairError:
            tables.foreign = "different_architecture"
    partial = any(len(tables.layers[role]) < m.depth for role, m in models.items())
    normed = not all(adds_up(m.model, tables.layers[role][-1]) for role, m in models.items())
    tables.flags = ("layers_without_softmax_heads",) * partial + ("norm_after_attention",) * normed
    return tables


def measure(
    cases: Cases, tables: Tables, means: dict[str, Baseline], steps: Iterable[int], pair: LoadedPair
) -> None:
    """Fill the tables.

    Args:
        cases: The prompts.
        tables: What to fill.
        means: The `mean` baseline of each model.
        steps: Which prompts, in order.
        pair: The models.
    """
    found: dict[Key, list[Tensor]] = {}
    scores: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    norms: dict[str, list[Tensor]] = {}
    for index in steps:
        both = {role: cases.case(role, index) for role in ROLES}
        states = {role: clean_states(case.side.loaded.model, case.prompt) for role, case in both.items()}
        for role, case in both.items():
            given = baselines(cases, case, role, means[role])
            if tables.apart is None:
                donor = states["base" if role == "tuned" else "tuned"]
                given["other_model"] = cases.across(case, role, donor.z)
            if tables.foreign is None and role == "tuned":
                changed = own_change(case.side.engine, pair.base.model, case.prompt, states[role])
                given["weights"] = Baseline(case.widened(changed.z or {}), changed.weights, case.inner)
                for kind, name in (("own", "weights"), ("inherited", "other_model")):
                    norms.setdefault(kind, []).append(_sizes(case, states[role], given[name]))
            done = attribute(case.side.loaded.model, placed(case), case.score, given)
            scores[role].append(done.scores[0])
            for name, values in done.values.items():
                found.setdefault((role, name), []).append(values.sum(0).flatten())
    tables.attribution = {key: torch.stack(rows) for key, rows in found.items()}
    tables.scores = {role: torch.stack(rows) for role, rows in scores.items()}
    tables.norms = {kind: torch.stack(rows) for kind, rows in norms.items()}


def baselines(cases: Cases, case: Case, role: str, mean: Baseline) -> dict[str, Baseline]:
    """Return what stands against heads within one model, by name; the counterfactual first."""
    return {
        cases.counterfactual: cases.counter(case, role),
        "zero": Baseline(where=case.inner),
        "mean": Baseline(mean.z, where=case.inner),
    }


def means_of(cases: Cases) -> dict[str, Baseline]:
    """Return the mean of every head over the counted positions of all prompts, by model."""
    found = {}
    for role in ROLES:
        sums: dict[int, Tensor] = {}
        count = 0
        for index in range(len(cases.prompts)):
            case = cases.case(role, index)
            z = clean_states(case.side.loaded.model, case.prompt).z
            inner = case.inner[0, : len(case.side.encoded[index])].to(case.batch.tokens.device)
            count += int(inner.sum())
            for layer, part in z.items():
                sums[layer] = sums.get(layer, 0) + part[0, inner].double().sum(0)
        dtype = cases.sides[role].loaded.model.dtype
        found[role] = Baseline(
            {layer: (total / count)[None, None].to(dtype) for layer, total in sums.items()}
        )
    return found


def edge_tables(
    cases: Cases, heads: Sequence[Head], steps: Iterable[int]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return attributions of the edges among heads by model, `(prompts, edges)`, and the edges' names."""
    found: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for index in steps:
        for role in ROLES:
            case = cases.case(role, index)
            batch, model = placed(case), case.side.loaded.model
            given = {"it": cases.counter(case, role)}
            done = attribute_edges(
                case.side.engine, batch, case.score, heads, given, clean_states(model, batch)
            )
            found[role].append(done["it"].sum(0))
    names = [
        f"{said(e.sender)}-{'logits' if e.receiver is None else said(e.receiver)}" for e in edges_among(heads)
    ]
    return {role: torch.stack(rows) for role, rows in found.items()}, names


def placed(case: Case) -> Batch:
    """Return the whole batch of a case with the places where heads count."""
    whole = case.batch
    return Batch(whole.tokens, whole.mask, case.inner.expand(len(whole.tokens), -1), whole.logits_at)


def said(head: Head) -> str:
    """Return a head's name, `<layer>.<head>`."""
    return f"{head[0]}.{head[1]}"


def _sizes(case: Case, states: States, baseline: Baseline) -> Tensor:
    """Return the relative size of a difference of every head, `(heads,)`."""
    model = case.side.loaded.model
    length = len(case.side.encoded[case.index])
    where = baseline.where if baseline.where is not None else case.inner
    chosen = (where & case.inner)[0, :length].to(case.batch.tokens.device)
    z = None if baseline.z is None else {at: part[:, :length] for at, part in baseline.z.items()}
    short = Baseline(z, baseline.weights)
    found = []
    for layer, own in states.z.items():
        changes = head_changes(own, head_weights(model, layer), short, layer)[0, chosen]
        scale = states.attention[layer][0, chosen].to(changes).norm(dim=-1).mean()
        found.append((changes.norm(dim=-1).mean(0) / scale).double().cpu())
    return torch.cat(found)
