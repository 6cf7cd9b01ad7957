"""Attribute a number to attention heads: the arithmetic, without a model.

1. A head adds r_h = z_h W_O,h to the residual. What it adds to a number m over a baseline r'_h is, to first
   order, Σ_p ⟨∂m/∂r(p), r_h(p) − r'_h(p)⟩, summed over positions p: gradient times activation for the
   baseline 0, attribution patching for the contribution in another run. It is minus the first-order effect of
   putting the baseline in the head's place.
2. The gradient is the same for all heads of a layer, because they are summed; each has its own W_O,h.
3. Integrated gradients replaces ∂m/∂r by its mean on the straight line from baseline to activation, all heads
   of a layer moving together. The attributions of the layer then add up to m at the activation − m at the
   baseline; how far they miss it is the completeness error.

Source: Nanda 2023, "Attribution patching"; Syed et al. 2023 (arXiv:2310.10348), equation 3; Sundararajan et
al. 2017 (arXiv:1703.01365), equation 1 and proposition 1; nodes by Golub and Welsch, Math. Comp. 23 (1969).
"""

from __future__ import annotations

import torch
from torch import Tensor

COMPLETENESS_LIMIT = 0.05
"""Share of the difference to explain that the attributions of a layer may miss before it is flagged."""


def head_products(gradient: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Contract a gradient at the residual with what each head adds to it.

    Args:
        gradient: ∂m/∂r, `(rows, T, d_model)`.
        z: Input of the output projection by head, `(rows, T, heads, width)`; rows and T may be 1.
        weight: Output projection by head, `(heads, width, d_model)`.

    Returns:
        ⟨gradient, z_h W_h⟩, `(rows, T, heads)`, in float32 or better.

    >>> z, weight = torch.tensor([[[[2.0], [3.0]]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> head_products(torch.tensor([[[10.0, 1.0]]]), z, weight).tolist()
    [[[20.0, 3.0]]]
    """
    precise = torch.promote_types(gradient.dtype, torch.float32)
    back = torch.einsum("rtd,hwd->rthw", gradient.to(precise), weight.to(precise))
    return (back * z.to(precise)).sum(-1)


def head_contributions(z: Tensor, weight: Tensor) -> Tensor:
    """Return what each head adds to the residual, `(rows, T, heads, d_model)`, in float32 or better.

    Args:
        z: Input of the output projection by head, `(rows, T, heads, width)`.
        weight: Output projection by head, `(heads, width, d_model)`.

    >>> head_contributions(torch.tensor([[[[2.0]]]]), torch.tensor([[[1.0, 5.0]]])).tolist()
    [[[[2.0, 10.0]]]]
    """
    precise = torch.promote_types(z.dtype, torch.float32)
    return torch.einsum("rthw,hwd->rthd", z.to(precise), weight.to(precise))


def gauss_legendre(steps: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of Gauss–Legendre quadrature on [0, 1], each `(steps,)`, float64.

    They integrate polynomials up to degree 2 `steps` − 1 exactly.

    Args:
        steps: Number of nodes, at least 1.

    >>> nodes, weights = gauss_legendre(3)
    >>> round((weights * nodes**5).sum().item(), 12) == round(1 / 6, 12)
    True
    """
    assert steps >= 1, f"{steps} steps"
    i = torch.arange(1, steps, dtype=torch.float64)
    side = i / (4 * i**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return (nodes + 1) / 2, vectors[0].square()


def completeness_error(total: Tensor, end: Tensor, start: Tensor) -> Tensor:
    """Say what share of a difference the attributions of a layer miss.

    Args:
        total: Sum of the attributions, `(...)`.
        end: The number at the activation, `(...)`.
        start: The number at the baseline, `(...)`.

    Returns:
        |total − (end − start)| / |end − start|, `(...)`, float64; 0 where both are 0, infinite where only the
        difference is.

    >>> completeness_error(torch.tensor(1.5), torch.tensor(3.0), torch.tensor(1.0)).item()
    0.25
    """
    gap = end.double() - start.double()
    missed = (total.double() - gap).abs()
    return torch.where(missed == 0, 0.0, missed / gap.abs())
