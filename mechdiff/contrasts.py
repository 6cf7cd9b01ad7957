"""Numbers that compare the pairs of a study, in the form of records: ``<out>/contrasts.json``.

1. What is compared is what a pair's report speaks of, at a site that a fixed rule gives, never at the better
   of several: the same prompts would choose it and measure it. Both sites stand beside the difference.
2. Pairs of models may answer the same prompts. Recoveries are then resampled by distinct prompt. Where values
   by prompt were not kept, the two are treated as independent and flagged ``not_paired``, unless they are
   known to share no prompt.
3. ``n`` counts distinct prompts; where they are not known by name, those of the larger side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from mechdiff.config import SEED
from mechdiff.functional.churn import churn_contrast, paired
from mechdiff.functional.contrast import independent_difference, recovery_difference
from mechdiff.functional.stats import Interval, generator
from mechdiff.reporting.report import handle, heads, maps, where
from mechdiff.reporting.report.content import Citations
from mechdiff.reporting.report.runs import CONTRASTS, Study
from mechdiff.reporting.report.view import View
from mechdiff.results import Record, Results

ITEMS = "items.parquet"
ROLES = ("base", "tuned")
KEPT = 0.01
"""Largest difference between a recovery and what its values by prompt make of it."""

Cells = dict[str, tuple[float, float]]  # prompt → nats left, nats of the gap


@dataclass(frozen=True)
class Side:
    """One pair's number.

    Attributes:
        name: Name of the pair.
        record: The number.
        prompts: The prompts behind it, None where they are not known by name.
        cells: What it is made of by prompt, if that was kept.
    """

    name: str
    record: Record
    prompts: frozenset[str] | None = None
    cells: Cells | None = None


def compare(study: Study) -> Path | None:
    """Write the numbers that compare every two pairs; None if there is nothing to compare.

    Args:
        study: The pairs, as read from the folder.
    """
    views = [View(pair, Citations()) for pair in study.pairs]
    found = [r for one, other in combinations(views, 2) for r in _differences(one, other)]
    if not found:
        return None
    folder = next(iter(study.pairs[0].runs.values())).path.parents[2]
    return Results(found, {"file": CONTRASTS}).write(folder / CONTRASTS)


def _differences(one: View, other: View) -> Iterator[Record]:
    """Yield other − one of the numbers that the report speaks of."""
    for quantity, pick in SPOKEN_OF.items():
        first, second = pick(one), pick(other)
        if first is not None and second is not None:
            ends = [_interval(side.record) for side in (first, second)]
            if first.cells and second.cells:
                draws = generator(SEED, quantity, one.name, other.name)
                found = recovery_difference(_joined(first.cells, second.cells), generator=draws)
                yield _difference(quantity, first, second, found, by_prompt=True)
            elif ends[0] is not None and ends[1] is not None:
                yield _difference(quantity, first, second, independent_difference(ends[0], ends[1]))
    shares = [heads.churn(view)[0] for view in (one, other)]
    tables = [_changes(view) for view in (one, other)]
    if shares[0] is None or shares[1] is None or tables[0] is None or tables[1] is None:
        return
    floors = (float(shares[0].params["floor"]), float(shares[1].params["floor"]))
    draws = generator(SEED, "churn_difference", one.name, other.name)
    found = churn_contrast(tables[0][1], tables[1][1], floors, generator=draws)
    first, second = (
        Side(view.name, share, frozenset(table[0]))
        for view, share, table in zip((one, other), shares, tables, strict=True)
        if share is not None and table is not None
    )
    difference = _difference("churn_difference", first, second, found)
    yield replace(difference, params={**difference.params, "floors": list(floors)})


def _difference(quantity: str, first: Side, second: Side, found: Interval, by_prompt: bool = False) -> Record:
    a, b = first.record, second.record
    about: dict[str, Any] = {
        "pairs": [first.name, second.name],
        "contrast": f"{second.name} − {first.name}",
    }
    about |= {"sites": [a.site, b.site]} if a.site or b.site else {}
    about |= {k: a.params[k] for k in ("rule", "floor_from", "direction") if k in a.params}
    if "edit" in a.params:  # each pair has a handle of its own
        about["handles"] = [f"{r.params['edit']}, k = {r.params['k']}" for r in (a, b)]
    known = first.prompts is not None and second.prompts is not None
    n = len((first.prompts or set()) | (second.prompts or set())) if known else max(a.n, b.n)
    apart = known and not (first.prompts or set()) & (second.prompts or set())
    return Record(
        a.question,
        quantity,
        found.value,
        n,
        a.unit,
        found.low,
        found.high,
        split=a.split,
        positions=a.positions,
        params=about,
        flags=("one_sibling_per_class", *(() if by_prompt or apart else ("not_paired",))),
    )


def _joined(first: Cells, second: Cells) -> Tensor:
    """Return left and gap of both by distinct prompt, ``(prompts, 4)``; 0 where a pair has not seen it."""
    names, none = sorted(first.keys() | second.keys()), (0.0, 0.0)
    return torch.tensor([[*first.get(p, none), *second.get(p, none)] for p in names], dtype=torch.float64)


def _rows(view: View, question: str, **where_: str) -> list[dict[str, Any]]:
    """Read a run's values per prompt, none if it kept none."""
    file = view.pair.runs[question].path.with_name(ITEMS) if view.has(question) else None
    if file is None or not file.is_file():
        return []
    return list(pq.read_table(file, filters=[(k, "=", v) for k, v in where_.items()]).to_pylist())


def _changes(view: View) -> tuple[list[str], Tensor] | None:
    """Read prompts and tuned − base of every head, ``(prompts, heads)``, if a run kept them.

    The heads stand in the order of their names; those that both models do not share are left out.
    """
    main = heads.family(view)
    measured = f"{main.get('metric')}/{main.get('baseline')}/"
    values = {
        (r["direction"], r["prompt"], r["arm"].removeprefix(measured)): r["value"]
        for r in _rows(view, "rq4", quantity="head_attribution")
        if r["arm"].startswith(measured)
    }
    prompts, names = (sorted({key[i] for key in values}) for i in (1, 2))
    names = [h for h in names if all((role, p, h) in values for role in ROLES for p in prompts)]
    if not prompts or not names:
        return None
    base, tuned = (torch.tensor([[values[role, p, h] for h in names] for p in prompts]) for role in ROLES)
    return prompts, paired(base, tuned)


def _recovery(view: View) -> Side | None:
    """Return what the patch recovers at the first of the layers handed on, which no recovery has chosen."""
    site = next((r.site for r in where.proposed(view) if r.params.get("rank") == 1), None)
    r = None if site is None else where.recovery(view, site)
    if r is None or r.value is None:
        return None
    about = {"quantity": "patch_kl_to_donor", "site": str(site), "positions": str(r.positions)}
    arms: dict[str, dict[str, float]] = {}
    for row in _rows(view, "rq1", **about, direction=str(r.params.get("direction"))):
        arms.setdefault(row["arm"], {})[row["prompt"]] = row["value"]
    patched, whole = arms.get("raw", {}), arms.get("self", {})  # put back, a state leaves the whole gap
    names = patched.keys() & whole.keys()
    names = names & arms["other_prompt"].keys() if "other_prompt" in arms else names
    cells = {p: (patched[p], whole[p]) for p in names}
    left, gap = (math.fsum(cell[i] for cell in cells.values()) for i in (0, 1))
    kept = len(cells) == r.n and gap > 0 and abs(1 - left / gap - r.value) <= KEPT
    return Side(view.name, r, frozenset(cells), cells) if kept else Side(view.name, r)


def _explained(view: View) -> Side | None:
    site = maps.site_of(view) if view.has("rq2") else None
    r = None if site is None else maps.cell(view, "r2_delta", site)
    return None if r is None else Side(view.name, r)


def _handle(view: View) -> Side | None:
    r = handle.best(view)[0] if view.has("rq3") else None
    if r is None:
        return None
    arm = f"{r.params.get('edit')}/{r.params.get('k')}"
    names = frozenset(row["prompt"] for row in _rows(view, "rq3", quantity="handle_kl", arm=arm))
    return Side(view.name, r, names if len(names) == r.n else None)


def _interval(r: Record) -> Interval | None:
    if r.value is None or r.low is None or r.high is None:
        return None
    return Interval(r.value, r.low, r.high, r.n)


SPOKEN_OF: dict[str, Callable[[View], Side | None]] = {
    "patch_recovery": _recovery,
    "r2_delta": _explained,
    "interchange_recovery": _handle,
}
"""What is compared, and how a pair's number is found: the one that its report speaks of."""
