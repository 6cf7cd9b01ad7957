"""How much two models differ in their weights, matrix by matrix.

1. Delta = W_tuned - W_base, in float64. Its size is the Frobenius norm, absolute and relative to that of
   W_base.
2. Stable rank ||Delta||_F^2 / ||Delta||_2^2 counts the directions as large as the largest one.
3. Effective rank exp(H(p)), with p the singular values divided by their sum and H the entropy, counts all
   directions by their size. It exceeds the rank of a planted change as soon as rounding adds many small
   directions; the stable rank hardly does.
4. The share of a matrix is its part of the sum of all squared norms.

Source: Rudelson and Vershynin, J. ACM 54 (2007), section 1 (stable rank); Roy and Vetterli, EUSIPCO 2007,
definition 1 (effective rank).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_NOISE = 1e-12  # of the largest eigenvalue: what rounding in float64 leaves of a zero one


class WeightChange(NamedTuple):
    """The difference of two weights.

    Attributes:
        norm: Frobenius norm of the difference.
        relative: The same divided by the norm of the base weight; infinite where that is 0 and the other is
            not.
        stable_rank: None for a vector; 0 without a difference.
        effective_rank: None for a vector; 0 without a difference.
    """

    norm: float
    relative: float
    stable_rank: float | None
    effective_rank: float | None


def weight_change(base: Tensor, tuned: Tensor, ranks: bool = True) -> WeightChange:
    """Measure the change of one weight.

    Args:
        base: Weight of the base model, `(rows, columns)` or of any other shape.
        tuned: Weight of the tuned model, the same shape.
        ranks: Whether to compute the ranks of a matrix, the costly part: one eigendecomposition of its
            smaller side.

    >>> change = weight_change(torch.eye(2), torch.tensor([[1.0, 3.0], [0.0, 1.0]]))
    >>> change.norm, round(change.relative, 3), round(change.stable_rank, 6), round(change.effective_rank, 6)
    (3.0, 2.121, 1.0, 1.0)
    """
    assert base.shape == tuned.shape, f"weights are {tuple(base.shape)} and {tuple(tuned.shape)}"
    delta = tuned.to(torch.float64) - base.to(torch.float64)
    norm, size = delta.norm().item(), base.to(torch.float64).norm().item()
    relative = norm / size if size else float("inf") if norm else 0.0
    if not ranks or delta.ndim != 2:
        return WeightChange(norm, relative, None, None)
    values = singular_values(delta)
    return WeightChange(norm, relative, stable_rank(values), effective_rank(values))


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix, descending, float64, from the Gram matrix of its smaller side.

    Those under 1e-6 of the largest cannot be told from 0 there, and are 0.

    Args:
        matrix: `(rows, columns)`.

    Returns:
        `(min(rows, columns),)`.

    >>> singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])).tolist()
    [4.0, 3.0]
    """
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).to(torch.float64)
    values = torch.linalg.eigvalsh(wide @ wide.T).flip(0)
    return torch.where(values > _NOISE * values[:1], values, 0.0).sqrt()


def stable_rank(values: Tensor) -> float:
    """Compute the squared Frobenius norm over the squared spectral norm; 0 without any.

    Args:
        values: Singular values, `(n,)`.

    >>> stable_rank(torch.tensor([2.0, 1.0]))
    1.25
    """
    squares = values.to(torch.float64).square()
    return (squares.sum() / squares.max()).item() if bool((squares > 0).any()) else 0.0


def effective_rank(values: Tensor) -> float:
    """Compute the exponential of the entropy of normalised singular values; 0 without any.

    Args:
        values: Singular values, `(n,)`.

    >>> round(effective_rank(torch.tensor([5.0, 5.0, 5.0, 0.0])), 12)
    3.0
    """
    values = values.to(torch.float64)
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total > 0 else 0.0


def change_shares(norms: Sequence[float] | Tensor) -> Tensor:
    """Compute each matrix's part of the whole change from Frobenius norms; 0 everywhere without a change.

    Args:
        norms: One norm per matrix, `(n,)`.

    Returns:
        Fractions that sum to 1, `(n,)`, float64.

    >>> change_shares([3.0, 4.0, 0.0]).tolist()
    [0.36, 0.64, 0.0]
    """
    squares = torch.as_tensor(norms, dtype=torch.float64).square()
    total = squares.sum()
    return squares / total if total > 0 else torch.zeros_like(squares)
