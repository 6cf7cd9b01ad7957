"""What the test split says of handles: how much of the models' difference they hold, and their angles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechdiff.functional.handles import principal_angles, random_basis
from mechdiff.functional.stats import bootstrap_ratio, generator
from mechdiff.modules.base import estimated, missing
from mechdiff.modules.steering_fit import Rows
from mechdiff.results import Record

if TYPE_CHECKING:
    from mechdiff.modules.steering import SteeringSubspace

DRAWS = 20
"""Random subspaces behind the share that a random one holds."""


def report(module: SteeringSubspace) -> Iterator[Record]:
    """Yield the records of a tested module."""
    for site, name in enumerate(module.sites):
        yield from _angles(module, site, name)
        yield from _shares(module, name, module.case(site))


def _shares(module: SteeringSubspace, name: str, rows: Rows) -> Iterator[Record]:
    """Share of the squared differences of held-out target prompts inside the first k directions."""
    change, prompt = rows.change, rows.prompt[rows.target]
    whole = change.square().sum(-1)
    tuned = rows.tuned.to(torch.float64)
    spread = (tuned - tuned.mean(0)).square().sum(-1).mean()
    about: dict[str, Any] = {
        "question": module.question,
        "site": name,
        "positions": module.where,
        "n": len(prompt.unique()),
        "rows": len(prompt),
        "unit": "fraction",
    }
    arms: list[tuple[str, str, Tensor]] = []
    for solver in module.solvers:
        arms.append((solver, "none", _inside(change, module.basis(name, solver))))
    for drawn, factor in (("isotropic", None), ("covariance", module.covariance_factor(name))):
        rank = module.k if factor is None else min(module.k, len(factor))
        if not rank:  # base's states do not vary
            continue
        draws = generator(module.seed, "energy_share", name, drawn)
        bases = [random_basis(rank, change.shape[1], draws, factor) for _ in range(DRAWS)]
        arms.append((drawn, "random", torch.stack([_inside(change, basis) for basis in bases]).mean(0)))
    for solver, control, held in arms:
        for k in range(1, held.shape[1] + 1):
            params = {"solver": solver, "contrast": module.contrast, "k": k}
            cell = {**about, "control": control, "params": params}
            if not whole.mean() > module.noise * spread:
                yield missing("energy_share", "gap_too_small", cell)
                continue
            draws = generator(module.seed, "energy_share", name)  # the same resamples for all
            share = bootstrap_ratio(held[:, k - 1], whole, generator=draws, groups=prompt)
            yield estimated("energy_share", share, cell)


def _angles(module: SteeringSubspace, site: int, name: str) -> Iterator[Record]:
    """Angles of the other solvers' subspaces with the module's own, which the training split gives."""
    main, *others = module.solvers
    for other in others:
        mine, its = module.basis(name, main), module.basis(name, other)
        for rank, angle in enumerate(principal_angles(mine.cpu(), its.cpu()).tolist(), 1):
            yield Record(
                module.question,
                "principal_angle",
                angle,
                int(module.fit_prompts[0]),
                "degrees",
                site=name,
                split="train",
                positions=module.where,
                params={
                    "solver": other,
                    "against": main,
                    "contrast": module.contrast,
                    "k": len(its),
                    "rank": rank,
                },
                flags=("no_difference",) if not module.delta[site].norm() > 0 else (),
            )


def _inside(change: Tensor, basis: Tensor) -> Tensor:
    """Squared length of every row inside the first 1, 2, ... k directions, `(rows, k)`."""
    return (change @ basis.to(change).mT).square().cumsum(-1)
