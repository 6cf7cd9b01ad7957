"""Directions and subspaces that carry a difference between two sets of states, and the edits along them.

1. A direction: the difference of two means, or that difference whitened by the scatter within the sets.
2. A subspace: the leading right singular vectors of paired differences, NOT centred, since centring removes
   whatever every pair shares; or a direction first and then the leading vectors orthogonal to it.
3. With orthonormal rows U and P = UᵀU: project_out h − P(h − c), project_in h + αPh, interchange
   h + αP(h' − h). They compute in float32 or better and round to the type of h last. An empty basis, and
   α = 0, return h bit for bit.

Source: Marks and Tegmark 2023 (arXiv:2310.06824), section 4 (difference in means, whitened); Arditi et al.
2024 (arXiv:2406.11717), section 2.4 (ablation); Geiger et al. 2023 (arXiv:2303.02536), section 3
(interchange in a subspace).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.config import SEED
from mechdiff.errors import FitError
from mechdiff.functional.stats import generator

SLACK = 1e-4
"""Largest deviation of U Uᵀ from the identity that rounding explains."""


class PairedBasis(NamedTuple):
    """A subspace and how much of the squared differences each direction captures.

    Attributes:
        basis: Orthonormal rows, the strongest first, `(k, d)`.
        energy: Share of the sum of squares of every direction, `(min(rows, d),)`; 0 where nothing differs.
    """

    basis: Tensor
    energy: Tensor


def difference_in_means(positive: Tensor, negative: Tensor) -> Tensor:
    """Subtract the mean of one set of states from that of another.

    Args:
        positive: `(rows, d)`.
        negative: `(rows, d)`, of another number of rows.

    Returns:
        `(d,)`, float64, not normalised.

    Raises:
        FitError: If a set is empty or their widths differ.

    >>> difference_in_means(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[1.0, 0.0]])).tolist()
    [1.0, 2.0]
    """
    a, b = _two_sets(positive, negative)
    return a.mean(0) - b.mean(0)


def whitened_directions(positive: Tensor, negative: Tensor, shrinkage: float = 0.1) -> Tensor:
    """Find the direction that best separates two sets of states, given how states scatter within them.

    Args:
        positive: `(rows, d)`.
        negative: `(rows, d)`.
        shrinkage: Weight of tr(Σ)/d · I against the pooled scatter Σ, above 0 and at most 1. At 1 this is the
            difference in means.

    Returns:
        Σ⁻¹ Δμ, `(d,)`, float64, of length 1.

    Raises:
        FitError: If the sets do not scatter, have the same mean, or the shrinkage is out of range.

    >>> spread = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> found = whitened_directions(spread + 1, spread, shrinkage=0.01)
    >>> bool(found[1] > 5 * found[0])  # the axis of less scatter counts more
    True
    """
    if not 0 < shrinkage <= 1:
        raise FitError(f"shrinkage is {shrinkage}; allowed: above 0, at most 1 (key: model.shrinkage)")
    a, b = _two_sets(positive, negative)
    within = torch.cat([a - a.mean(0), b - b.mean(0)])
    scatter = within.T @ within / len(within)
    level = scatter.diagonal().mean()
    if not level > 0:
        raise FitError("states do not scatter within the classes; allowed: 2 or more (key: model.compare)")
    floor = shrinkage * level * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
    return _unit(torch.linalg.solve((1 - shrinkage) * scatter + floor, a.mean(0) - b.mean(0)))


def paired_svd(differences: Tensor, k: int) -> PairedBasis:
    """Find the subspace of rank k that captures most of the squared differences, which are not centred.

    Args:
        differences: `(rows, d)`, tuned − base on the same tokens.
        k: Rank. Directions beyond the number of rows capture nothing and are any orthonormal completion.

    Raises:
        FitError: If there are no rows, or k is outside 1..d.

    >>> found = paired_svd(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), 1)
    >>> found.basis.abs().tolist(), [round(share, 2) for share in found.energy.tolist()]
    ([[0.0, 1.0, 0.0]], [0.64, 0.36])
    """
    rows = _rows(differences)
    _check_rank(k, rows.shape[1])
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    energy, total = values.square(), values.square().sum()
    return PairedBasis(complete(vectors[:k], k), energy / total if total > 0 else energy)


def svd_around_direction(direction: Tensor, rows: Tensor, k: int) -> Tensor:
    """Build a subspace from a direction and the leading components of rows orthogonal to it.

    Args:
        direction: `(d,)`, of any length but 0.
        rows: `(rows, d)`; what is left of them orthogonal to the direction is decomposed, not centred.
        k: Rank, the direction included. Beyond the rank of the rows, any orthonormal completion.

    Returns:
        Orthonormal rows, the direction first, `(k, d)`, float64.

    Raises:
        FitError: If the direction is 0, there are no rows, or k is outside 1..d.

    >>> basis = svd_around_direction(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([[5.0, 0.0, 1.0]]), 2)
    >>> basis.abs().tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    rows = _rows(rows)
    _check_rank(k, rows.shape[1])
    first = _unit(direction.detach().to(rows))
    rest = rows - torch.outer(rows @ first, first)
    _, values, vectors = torch.linalg.svd(rest, full_matrices=False)
    # Directions of rounding alone need not be orthogonal to the first one.
    real = values > max(rows.shape) * torch.finfo(rows.dtype).eps * torch.linalg.matrix_norm(rows)
    return complete(torch.cat([first[None], vectors[real][: k - 1]]), k)


def complete(basis: Tensor, k: int) -> Tensor:
    """Extend orthonormal rows to k of them; the added ones are random, but always the same.

    Args:
        basis: Orthonormal rows, `(r, d)`, r ≤ k; none is allowed.
        k: Wanted number of rows, at most d.

    Returns:
        `(k, d)`; the first r rows are those of `basis`.

    >>> complete(torch.tensor([[1.0, 0.0]]), 2).abs().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    have, d = basis.shape
    assert have <= k <= d, f"{have} rows of width {d} cannot become {k}"
    if have == k:
        return basis
    draws = torch.randn(k - have, d, dtype=torch.float64, generator=generator(SEED, "complete", have, k, d))
    spanning = torch.cat([basis, draws.to(basis)])
    return torch.cat([basis, torch.linalg.qr(spanning.mT).Q.mT[have:]])


def orthonormal(basis: Tensor, key: str = "basis") -> Tensor:
    """Return a basis as it is if its rows are orthonormal.

    Args:
        basis: `(k, d)`, or several of them `(..., k, d)`.
        key: What to name in the message.

    Raises:
        FitError: If k is outside 1..d, or U Uᵀ deviates from the identity by more than `SLACK`.

    >>> orthonormal(torch.eye(3)[:2]).shape
    torch.Size([2, 3])
    """
    _check_rank(basis.shape[-2], basis.shape[-1], key)
    rows = basis.detach().to(torch.promote_types(basis.dtype, torch.float32))
    gram = rows @ rows.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    off = (gram - identity).abs().max().item()
    if not off <= SLACK:
        raise FitError(f"the rows of a basis are off orthonormal by {off:.2g}; allowed: {SLACK} (key: {key})")
    return basis


def project_out(h: Tensor, basis: Tensor, center: Tensor | None = None) -> Tensor:
    """Set the component in a subspace to that of a centre: h − P(h − c).

    Args:
        h: `(..., d)`.
        basis: Orthonormal rows, `(k, d)`, or one basis for each of a batch `(batch, k, d)` with h
            `(batch, T, d)`; k = 0 changes nothing.
        center: `(d,)`; 0 by default.

    Returns:
        Like `h`.

    Raises:
        FitError: If the basis is not orthonormal.

    >>> project_out(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 9.0])).tolist()
    [1.0, 4.0]
    """
    if not basis.shape[-2]:
        return h
    exact = _exact(h)
    away = exact if center is None else exact - center.to(exact)
    return (exact - _inside(away, basis)).to(h.dtype)


def project_in(h: Tensor, basis: Tensor, alpha: float = 1.0) -> Tensor:
    """Amplify the component in a subspace: h + αPh.

    Args:
        h: `(..., d)`.
        basis: As in `project_out`.
        alpha: 0 changes nothing.

    Raises:
        FitError: If the basis is not orthonormal.

    >>> project_in(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]]), 0.5).tolist()
    [4.5, 4.0]
    """
    if not basis.shape[-2] or alpha == 0:
        return h
    exact = _exact(h)
    return (exact + alpha * _inside(exact, basis)).to(h.dtype)


def interchange(h: Tensor, other: Tensor, basis: Tensor, alpha: float = 1.0) -> Tensor:
    """Move the component in a subspace to that of other states: h + αP(h' − h).

    Args:
        h: `(..., d)`.
        other: h', of the shape of `h`.
        basis: As in `project_out`.
        alpha: 0 changes nothing; 1 is the whole interchange.

    Raises:
        FitError: If the basis is not orthonormal.

    >>> interchange(torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0]), torch.tensor([[1.0, 0.0]])).tolist()
    [5.0, 4.0]
    """
    if not basis.shape[-2] or alpha == 0:
        return h
    exact = _exact(h)
    return (exact + alpha * _inside(other.to(exact) - exact, basis)).to(h.dtype)


def _inside(states: Tensor, basis: Tensor) -> Tensor:
    """Project states on a subspace, in their type."""
    rows = orthonormal(basis).to(states)
    return (states @ rows.mT) @ rows


def _exact(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _unit(direction: Tensor) -> Tensor:
    length = direction.norm()
    if not length > 0:
        raise FitError("a direction of length 0 points nowhere; the two sets must differ in their means")
    return direction / length


def _rows(states: Tensor) -> Tensor:
    assert states.ndim == 2, f"expected (rows, d), got shape {tuple(states.shape)}"
    if not len(states):
        raise FitError("a subspace of 0 rows is undefined; at least 1 is needed (key: data.positions)")
    assert bool(states.isfinite().all()), "a subspace needs finite states"
    return states.detach().to(torch.float64)


def _two_sets(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _rows(positive), _rows(negative)
    if a.shape[1] != b.shape[1]:
        raise FitError(f"states of width {a.shape[1]} and {b.shape[1]} differ; allowed: equal widths")
    return a, b


def _check_rank(k: int, d: int, key: str = "model.k") -> None:
    if not 1 <= k <= d:
        raise FitError(f"k is {k}; allowed: 1 to {d}, the width of the states (key: {key})")
