"""Subspaces: few directions per site, however they were found, and the edits along them.

1. Per site: an orthonormal basis for every solver, the difference in means, means of neutral states, a map
   from base's to tuned's states, the usual size of a state. All are buffers, so that a checkpoint holds them.
2. An edit moves a state within a subspace: by a fixed shift, to the other model's state, to the mapped state,
   away from 0, or to the mean of neutral prompts.
3. An edit is a pure function of states (`mechdiff.functional.edits`) and can be had for single tokens
   (`change`) or for a running model (`edits`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from mechdiff.errors import FitError
from mechdiff.functional.clt import AffineMap
from mechdiff.functional.edits import Known, change, check_edit
from mechdiff.functional.moments import check_equal_widths
from mechdiff.interventions.sites import POSITIONS, Site
from mechdiff.modules.base import UNTOUCHED, DiffModule, refuse_other_fit
from mechdiff.modules.steering_fit import FACTOR, Contrast, Handles, Recipe, Subspace

if TYPE_CHECKING:
    from mechdiff.interventions.hooks import Edit


class Subspaces(DiffModule):
    """Subspaces of the sites of two models of one width.

    Args:
        sites: Sites of tuned, such as ``resid_post.12``.
        source_sites: Site of base for each of them; the same sites by default.
        positions: Groups of positions whose rows are used.
        d_source: Width of base, read from its store.
        d_target: Width of tuned, read from its store; the same.
        noise: Share of the variance below which a difference is rounding of the stored states.
        solver: The estimator of the handle.
        compare: Estimators that are reported beside it.
        contrast: Whose means are subtracted: tuned's of target and neutral prompts (``classes``), or tuned's
            and base's of target prompts (``models``).
        k: Rank, for solvers of more than one direction.
        shrinkage: Of the scatter within the sets, for ``whitened``.
        lambdas: Ridge strengths of the map to choose from.
        seed: Seed of random subspaces and resampling.

    Raises:
        FitError: If a setting is out of range or the widths differ.
    """

    question = "rq3"
    delta: Tensor
    neutral_tuned: Tensor
    map_weight: Tensor
    map_bias: Tensor
    factor: Tensor
    energy: Tensor
    chosen: Tensor
    fit_prompts: Tensor

    def __init__(
        self,
        sites: Sequence[str],
        source_sites: Sequence[str] | None,
        positions: Sequence[str],
        d_source: int,
        d_target: int,
        noise: float,
        solver: Subspace,
        compare: Sequence[Subspace],
        contrast: Contrast,
        k: int,
        shrinkage: float,
        lambdas: Sequence[float],
        seed: int,
    ) -> None:
        super().__init__()
        _check(solver, compare, contrast, shrinkage, lambdas)
        check_equal_widths(d_source, d_target)
        if not 1 <= k <= d_target:
            raise FitError(f"k is {k}; allowed: 1 to {d_target}, the width of the states (key: model.k)")
        self.sites, self.sources = list(sites), list(source_sites or sites)
        self.positions = [name for name in POSITIONS if name in positions]
        if set(positions) - set(POSITIONS) or not self.positions:
            raise FitError(f"model.positions is {list(positions)}; allowed: some of {', '.join(POSITIONS)}")
        if len(self.sources) != len(self.sites):
            counts = f"{len(self.sources)} entries for {len(self.sites)} sites"
            raise FitError(f"model.source_sites has {counts}; allowed: as many as sites")
        self.solver_name: str = solver
        self.solvers: list[str] = list(dict.fromkeys((solver, *compare)))
        self.recipe = Recipe(tuple(self.solvers), k, contrast, shrinkage, tuple(lambdas))
        self.noise, self.seed, self.contrast, self.k = noise, seed, contrast, self.recipe.rank(solver)
        count, d = len(self.sites), d_target
        for name in self.solvers:
            self.register_buffer(f"basis_{name}", torch.zeros(count, self.recipe.rank(name), d))
        for name, shape in (
            ("delta", (d,)),
            ("neutral_tuned", (d,)),
            ("map_weight", (d, d)),
            ("map_bias", (d,)),
            ("factor", (min(FACTOR, d), d)),
            ("energy", (self.k,)),
        ):
            self.register_buffer(name, torch.zeros(count, *shape))
        self.register_buffer("chosen", torch.full((count,), -1))
        self.register_buffer("fit_prompts", torch.zeros(2, dtype=torch.int64))  # target, neutral

    # --- what was fitted -----------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether subspaces have been fitted or loaded."""
        return self.chosen.numel() > 0 and bool((self.chosen >= 0).all())

    @property
    def where(self) -> str:
        """What records say of the positions."""
        return "all" if len(self.positions) == len(POSITIONS) else "+".join(self.positions)

    def basis(self, site: Site | str, solver: str | None = None, k: int | None = None) -> Tensor:
        """Return the leading directions of a subspace.

        Args:
            site: One of ``sites``.
            solver: One of ``solvers``; the module's own by default.
            k: How many; all by default.

        Returns:
            Orthonormal rows, ``(k, d)``, float32.

        Raises:
            FitError: If there is no such site or solver, or not as many directions.
        """
        solver = solver or self.solver_name
        if solver not in self.solvers:
            raise FitError(f"solver is {solver!r}; allowed: {', '.join(self.solvers)} (key: solver)")
        rows = getattr(self, f"basis_{solver}")[self.index(site)]
        if k is not None and not 1 <= k <= len(rows):
            raise FitError(f"k is {k} with solver {solver}; allowed: 1 to {len(rows)} (key: k)")
        return rows[:k]

    def index(self, site: Site | str) -> int:
        """Return the index of a site.

        Raises:
            FitError: If it is not one of ``sites``.
        """
        if str(site) not in self.sites:
            raise FitError(f"site is {site}; allowed: {', '.join(self.sites)} (key: site)")
        return self.sites.index(str(site))

    def covariance_factor(self, site: Site | str) -> Tensor:
        """Return F with FᵀF the covariance of base's states, for random subspaces, ``(r, d)``."""
        rows = self.factor[self.index(site)]
        size = rows.norm(dim=-1)
        return rows[size > 1e-6 * size.max()]

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters that a checkpoint must share with the module it is loaded into."""
        return {
            "sites": self.sites,
            "source_sites": self.sources,
            "positions": self.positions,
            "solver": self.recipe.solvers[0],
            "contrast": self.contrast,
            "k": self.recipe.k,
        }

    def fill(self, site: int, found: Handles) -> None:
        """Write what was found at a site into the buffers."""
        for solver, basis in found.bases.items():
            getattr(self, f"basis_{solver}")[site] = basis.to(self.delta)
        for name in ("delta", "neutral_tuned"):
            getattr(self, name)[site] = getattr(found, name).to(self.delta)
        self.map_weight[site] = found.affine.weight.to(self.delta)
        self.map_bias[site] = found.affine.bias.to(self.delta)
        self.factor[site].zero_()
        self.factor[site, : len(found.factor)] = found.factor.to(self.delta)
        self.chosen[site] = found.chosen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the subspaces of other sites, or those fitted in another way.

        Raises:
            CheckpointError: If they are.
        """
        refuse_other_fit(self, checkpoint, "other subspaces: class, solvers, k, sites or widths")

    # --- edits ---------------------------------------------------------------------------------------------

    def forward(self, source: Tensor) -> Tensor:
        """Project states ``(..., d)`` on the first site's subspace."""
        rows = self.basis(self.sites[0]).to(source)
        return (source @ rows.mT) @ rows

    def change(
        self,
        site: Site | str,
        kind: str,
        h: Tensor,
        donor: Tensor | None = None,
        *,
        basis: Tensor | None = None,
        alpha: float = 1.0,
    ) -> Tensor:
        """Edit states; α = 0, and a basis of no rows, return them bit for bit.

        Args:
            site: Whose means and map are used.
            kind: ``add`` α·Δμ (or its length along a basis of one row); ``interchange`` and ``reverse`` move
                the component in the subspace to the donor's, tuned's or base's; ``mapped`` to that of the
                mapped state; ``amplify`` multiplies it by 1 + α; ``ablate`` sets it to that of tuned's mean
                neutral state, at α = 1 only; ``none``.
            h: ``(..., d)``.
            donor: The other model's states, of the shape of ``h``.
            basis: Orthonormal rows ``(k, d)``, or ``(batch, k, d)`` with h ``(batch, T, d)``; by default the
                module's own, and for ``add`` Δμ itself.
            alpha: Strength; 1 is the whole natural edit.

        Returns:
            Like ``h``.

        Raises:
            FitError: If the kind, the strength or the rank is not allowed, or the basis not orthonormal.
        """
        check_edit(kind, alpha)
        if basis is None and kind not in ("add", "none"):
            basis = self.basis(site)
        return change(h, kind, self.known(site, basis), donor, alpha)

    def known(self, site: Site | str, basis: Tensor | None) -> Known:
        """Return what edits need to know of a site.

        Args:
            site: One of ``sites``.
            basis: Orthonormal rows.
        """
        index = self.index(site)
        affine = AffineMap(self.map_weight[index], self.map_bias[index])
        return Known(basis, self.delta[index], self.neutral_tuned[index], affine)

    def edits(self, donor: Mapping[Site, Tensor] | None, where: Tensor, **cell: Any) -> Mapping[Site, Edit]:
        """Return the edit of one site; see `change`.

        Args:
            donor: ``{site: (batch, position, d)}`` in the recipient's rows, for kinds that need it.
            where: ``(batch, position)``; ``UNTOUCHED`` keeps what is there.
            **cell: ``site``, ``kind``, ``alpha`` and ``k``; optionally ``solver``, or ``basis`` instead of
                solver and k. Without k, ``add`` adds Δμ itself.

        Raises:
            FitError: If the cell is not allowed.
        """
        site, kind, alpha = Site.parse(cell["site"]), cell["kind"], cell.get("alpha", 1.0)
        basis, k = cell.get("basis"), cell.get("k")
        if basis is None and (k is not None or cell.get("solver") or kind != "add"):
            basis = self.basis(site, cell.get("solver"), k)
        nothing = where.new_zeros(0, self.delta.shape[-1], dtype=torch.float32)
        self.change(site, kind, nothing, nothing, basis=basis, alpha=alpha)  # mistakes show before a run
        if kind == "none" or alpha == 0:
            return {}
        states = None if donor is None else donor.get(site)

        def edit(activation: Tensor, _positions: Tensor) -> Tensor:
            changed = self.change(site, kind, activation, states, basis=basis, alpha=alpha)
            return torch.where((where != UNTOUCHED)[..., None].to(activation.device), changed, activation)

        return {site: edit}


def _check(
    solver: str, compare: Sequence[str], contrast: str, shrinkage: float, lambdas: Sequence[float]
) -> None:
    for key, given, allowed in (
        ("solver", [solver], get_args(Subspace)),
        ("compare", compare, get_args(Subspace)),
        ("contrast", [contrast], get_args(Contrast)),
    ):
        for name in given:
            if name not in allowed:
                raise FitError(f"model.{key} has {name!r}; allowed: {', '.join(allowed)}")
    if not 0 < shrinkage <= 1:
        raise FitError(f"model.shrinkage is {shrinkage}; allowed: above 0, at most 1")
    if not lambdas or not all(math.isfinite(lambda_) and lambda_ >= 0 for lambda_ in lambdas):
        raise FitError(f"model.lambdas is {list(lambdas)}; allowed: one or more finite numbers, none below 0")
