"""What the test split says of a CLTMap: one record per site, group of positions, quantity and control."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mechdiff.config import LEVEL
from mechdiff.functional.cka import cka_jackknife
from mechdiff.functional.clt import map_states
from mechdiff.functional.r2 import sse_rows
from mechdiff.functional.stats import Interval, bootstrap_mean, bootstrap_ratio, bootstrap_sums, generator
from mechdiff.results import Record

if TYPE_CHECKING:
    from mechdiff.modules.clt import CLTMap

MIN_PROMPTS = 5
"""A delete-one interval of the debiased CKA needs as many prompts."""


class Case(NamedTuple):
    """Paired test rows: source ``(rows, d_source)``, target ``(rows, d_target)``, index of the prompt ``(rows,)``."""

    x: Tensor
    y: Tensor
    prompt: Tensor


def report(module: CLTMap) -> Iterator[Record]:
    """Yield the records of a tested map."""
    for site in range(len(module.sites)):
        for group in range(len(module.positions)):
            yield from _cell(module, site, group)
    if module.matrix:
        yield from _matrix(module)


def _cell(module: CLTMap, site: int, group: int) -> Iterator[Record]:
    case = module.case(site, site, group)
    name, positions = module.sites[site], module.positions[group]
    common = _common(module, site, group, case)
    predictions = {"none": map_states(case.x, module.affine(site, group))}
    predictions |= {kind: map_states(case.x, module.affine(site, group, kind)) for kind in module.controls()}
    if module.equal_widths:
        predictions["identity"] = case.x
    gap = sse_rows(case.x, case.y) if module.equal_widths else None
    spread = sse_rows(case.y.mean(0), case.y)
    too_small = gap is not None and not gap.sum() > module.noise * spread.sum()

    def draws(quantity: str) -> torch.Generator:
        return generator(
            module.seed, quantity, name, positions
        )  # the same resamples for the map and its controls

    for control, predicted in predictions.items():
        row = {**common, "control": control}
        errors = sse_rows(predicted, case.y)
        yield _ratio("r2", errors, spread, case.prompt, draws("r2"), row)
        yield _record("r2_median", _median_r2(predicted, case, draws("r2_median")), row)
        cosine = torch.cosine_similarity(predicted.double(), case.y.double(), dim=-1)
        yield _record("cosine", bootstrap_mean(cosine, generator=draws("cosine"), groups=case.prompt), row)
        if gap is not None and control != "identity":  # the identity is the zero of this scale
            yield (
                _missing("r2_delta", row, "gap_too_small")
                if too_small
                else _ratio("r2_delta", errors, gap, case.prompt, draws("r2_delta"), row)
            )
        if control in ("none", "identity"):
            yield _cka("cka", predicted, case, row, debiased=False)
            yield _cka("cka_debiased", predicted, case, row, debiased=True)


def _matrix(module: CLTMap) -> Iterator[Record]:
    for group, positions in enumerate(module.positions):
        for source in range(len(module.sites)):
            for target, name in enumerate(module.sites):
                case = module.case(source, target, group)
                predicted = map_states(case.x, module.cross_map(source, target, group))
                row = _common(module, target, group, case)
                row["params"] = {
                    "source_site": module.sources[source],
                    "solver": "ridge",
                    "shrink": "zero",
                    "matrix": True,
                }
                draws = generator(module.seed, "r2", "matrix", name, positions)
                yield _ratio(
                    "r2",
                    sse_rows(predicted, case.y),
                    sse_rows(case.y.mean(0), case.y),
                    case.prompt,
                    draws,
                    row,
                )


def _common(module: CLTMap, site: int, group: int, case: Case) -> dict[str, Any]:
    chosen = int(module.chosen[site, group])
    edge = module.has_path and len(module.lambdas) > 1 and chosen in (0, len(module.lambdas) - 1)
    params = {
        "solver": module.solver_name,
        "lambda_": module.lambdas[chosen] if module.has_path else None,
        "k": module.rank,
        "source_site": module.sources[site],
    }
    return {
        "question": "rq2",
        "site": module.sites[site],
        "positions": module.positions[group],
        "params": params,
        "n": len(case.prompt.unique()),
        "rows": len(case.x),
        "flags": ("lambda_at_edge",) if edge else (),
    }


def _record(quantity: str, estimate: Interval, row: dict[str, Any], unit: str = "fraction") -> Record:
    ends = [end if math.isfinite(end) else None for end in (estimate.low, estimate.high)]
    flags = (*row["flags"], *(["unbounded_interval"] if None in ends else []))
    return Record(
        quantity=quantity,
        value=estimate.value,
        low=ends[0],
        high=ends[1],
        unit=unit,
        **{**row, "flags": flags},
    )


def _missing(quantity: str, row: dict[str, Any], reason: str) -> Record:
    return Record(quantity=quantity, value=None, reason=reason, unit="fraction", **row)


def _ratio(
    quantity: str, errors: Tensor, whole: Tensor, prompt: Tensor, draws: torch.Generator, row: dict[str, Any]
) -> Record:
    if not whole.sum() > 0:
        return _missing(quantity, row, "no_variance")
    return _record(
        quantity, bootstrap_ratio(errors, whole, generator=draws, groups=prompt, complement=True), row
    )


def _median_r2(predicted: Tensor, case: Case, draws: torch.Generator) -> Interval:
    """Median over dimensions of R², with the medians of the resamples around it."""
    y = case.y.double()
    errors, spread = (y - predicted.double()).square(), (y - y.mean(0)).square()

    def median(sums: Tensor) -> Tensor:
        top, bottom = sums.chunk(2, dim=-1)
        varies = bottom > 0
        r2 = torch.where(varies, 1 - top / bottom.where(varies, torch.ones_like(bottom)), torch.nan)
        return r2.nanmedian(-1).values.nan_to_num(0.0)

    return bootstrap_sums(
        torch.cat([errors, spread], 1), median, generator=draws, groups=case.prompt, level=LEVEL
    )


def _cka(quantity: str, predicted: Tensor, case: Case, row: dict[str, Any], debiased: bool) -> Record:
    if row["n"] < MIN_PROMPTS:
        return _missing(quantity, row, "too_few_prompts")
    return _record(quantity, cka_jackknife(predicted, case.y, debiased=debiased, groups=case.prompt), row)
