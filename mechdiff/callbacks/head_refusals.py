"""Churn in percentage points of the probability of refusing, from exact exchanges.

The probability is that of the log-odds of refusing, whole openings against complying ones. Every opening is a
row of its own, so that only the heads with the largest attribution are tried, on a few prompts. Shares are of
these heads, the `rows` of a record of group `attribution`, and no shares of all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from mechdiff.callbacks.graded import Openings, refusing
from mechdiff.callbacks.head_cases import Cases
from mechdiff.callbacks.head_passes import effects
from mechdiff.callbacks.head_records import HeadRecords
from mechdiff.callbacks.head_tables import ROLES, said
from mechdiff.results import Record


def refusal_churn(
    records: HeadRecords,
    openings: Mapping[str, Openings],
    steps: Sequence[int],
    most: int,
    track: Callable[[Iterable[int], str], Iterable[int]],
) -> Iterator[Record]:
    """Yield the exact effect of some heads on the probability of refusing in each model, and its churn.

    Args:
        records: Those of the main measurement, by which heads are chosen.
        openings: Refusing and complying openings by language.
        steps: Prompts, by index; those whose language has no openings are left out.
        most: Number of heads.
        track: Shows progress.
    """
    cases, tables = records.cases, records.tables
    able = [i for i in steps if cases.prompts[i].lang in openings]
    if not able:
        return
    name = cases.counterfactual
    size = torch.stack([tables.attribution[role, name].mean(0).abs() for role in ROLES]).sum(0)
    columns = sorted(size.argsort(descending=True, stable=True)[:most].tolist())
    heads = [tables.names()[i] for i in columns]
    read = [refusing(openings[p.lang]) if p.lang in openings else None for p in cases.prompts]
    asked: Cases = replace(cases, metric="refusal", graded=read)
    found = {}
    for role in ROLES:
        rows = []
        for index in track(able, f"refusing: {role}"):
            case = asked.case(role, index)
            rows.append(effects(case, asked.counter(case, role), heads))
        found[role] = torch.stack(rows)
    of_refusals = HeadRecords(asked, tables, records.seed, records.nulls)
    values = {"pair": found["tuned"] - found["base"], **found}
    names = [said(head) for head in heads]
    for model, table in values.items():
        yield from of_refusals.chosen(table, names, "patch", name, model)
    yield from of_refusals.judged(found["base"], found["tuned"], name, names, "heads", "patch", "attribution")
