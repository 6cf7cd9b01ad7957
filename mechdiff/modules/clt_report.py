"""What the test split says of affine maps: one record per site, group of positions, quantity and control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mechdiff.functional.clt import map_states
from mechdiff.functional.r2 import sse_rows
from mechdiff.functional.stats import Interval, bootstrap_mean, bootstrap_ratio, bootstrap_sums, generator
from mechdiff.modules.base import estimated, missing, similarity
from mechdiff.results import Record

if TYPE_CHECKING:
    from mechdiff.modules.clt import CLTMap
    from mechdiff.modules.maps import AffineMaps


class Case(NamedTuple):
    """Paired test rows: `(rows, d_source)` and `(rows, d_target)`, and their prompt's index `(rows,)`."""

    x: Tensor
    y: Tensor
    prompt: Tensor


def report(module: AffineMaps) -> Iterator[Record]:
    """Yield the records of tested maps."""
    for site in range(len(module.sites)):
        for group in range(len(module.positions)):
            yield from _cell(module, site, group)


def report_matrix(module: CLTMap) -> Iterator[Record]:
    """Yield R² from every source site to every target site."""
    for group, positions in enumerate(module.positions):
        for source in range(len(module.sites)):
            for target, name in enumerate(module.sites):
                case = module.case(source, target, group)
                affine, params, flags = module.cross(source, target, group)
                about = _about(module, target, group, case, params, flags)
                if not len(case.x):
                    yield missing("r2", "no_rows", about)
                    continue
                draws = generator(module.seed, "r2", "matrix", name, positions)
                errors = sse_rows(map_states(case.x, affine), case.y)
                yield _ratio("r2", errors, sse_rows(case.y.mean(0), case.y), case.prompt, draws, about)


def _cell(module: AffineMaps, site: int, group: int) -> Iterator[Record]:
    case = module.case(site, site, group)
    name, positions = module.sites[site], module.positions[group]
    common = _about(module, site, group, case, module.params(site, group), module.flags(site, group))
    if not len(case.x):
        yield missing("r2", "no_rows", common)
        return
    kinds = {"none": "mapped"} | {kind: kind for kind in module.controls()}
    gap = sse_rows(case.x, case.y) if module.equal_widths else None
    spread = sse_rows(case.y.mean(0), case.y)
    too_small = gap is not None and not gap.sum() > module.noise * spread.sum()

    def draws(quantity: str) -> torch.Generator:
        """The same resamples for the map and its controls."""
        return generator(module.seed, quantity, name, positions)

    for control in [*kinds, *(["identity"] if module.equal_widths else [])]:
        mapped = control in kinds  # one prediction is held at a time
        predicted = map_states(case.x, module.affine(site, group, kinds[control])) if mapped else case.x
        about = {**common, "control": control}
        if control in ("identity", "mean_shift"):  # nothing was chosen for these
            about |= {"params": {**common["params"], "lambda_": None, "k": None}, "flags": ()}
        errors = sse_rows(predicted, case.y)
        yield _ratio("r2", errors, spread, case.prompt, draws("r2"), about)
        yield estimated("r2_median", _median_r2(predicted, case, draws("r2_median")), about)
        cosine = torch.cosine_similarity(predicted.double(), case.y.double(), dim=-1)
        yield estimated(
            "cosine", bootstrap_mean(cosine, generator=draws("cosine"), groups=case.prompt), about
        )
        if gap is not None and control != "identity":  # the identity is the zero of this scale
            yield (
                missing("r2_delta", "gap_too_small", about)
                if too_small
                else _ratio("r2_delta", errors, gap, case.prompt, draws("r2_delta"), about)
            )
        if control in ("none", "identity"):
            for quantity in ("cka", "cka_debiased"):
                yield similarity(quantity, predicted, case.y, case.prompt, about)


def _about(
    module: AffineMaps, site: int, group: int, case: Case, params: dict[str, Any], flags: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "question": "rq2",
        "site": module.sites[site],
        "positions": module.positions[group],
        "params": params,
        "n": len(case.prompt.unique()),
        "rows": len(case.x),
        "unit": "fraction",
        "flags": flags,
    }


def _ratio(
    quantity: str,
    errors: Tensor,
    whole: Tensor,
    prompt: Tensor,
    draws: torch.Generator,
    about: dict[str, Any],
) -> Record:
    if not whole.sum() > 0:
        return missing(quantity, "no_variance", about)
    share = bootstrap_ratio(errors, whole, generator=draws, groups=prompt, complement=True)
    return estimated(quantity, share, about)


def _median_r2(predicted: Tensor, case: Case, draws: torch.Generator) -> Interval:
    """Median over dimensions of R², with the medians of the resamples around it.

    One prompt is taken after the other: squares of all rows would be several times what the states are.
    """
    mean = case.y.double().mean(0)
    order = case.prompt.argsort(stable=True)
    sizes = case.prompt[order].unique_consecutive(return_counts=True)[1].tolist()
    sums = torch.zeros(len(sizes), 2 * len(mean), dtype=torch.float64)
    for prompt, rows in enumerate(order.split(sizes)):
        y = case.y[rows].double()
        cells = torch.cat([(y - predicted[rows].double()).square(), (y - mean).square()], 1)
        ranks = cells.sum(1).argsort(stable=True)
        sums.index_add_(0, torch.full_like(rows, prompt), cells[ranks])

    def median(sums: Tensor) -> Tensor:
        top, bottom = sums.chunk(2, dim=-1)
        varies = bottom > 0
        r2 = torch.where(varies, 1 - top / bottom.where(varies, torch.ones_like(bottom)), torch.nan)
        return r2.nanmedian(-1).values.nan_to_num(0.0)

    return bootstrap_sums(sums, median, generator=draws)
