"""Projection-weighted canonical correlation between two sets of activations of the same rows.

1. X and Y are centred, and cut to the directions that hold most of their variance: with as many directions
   as rows any two sets correlate perfectly.
2. With X = U_x S V_xᵀ and Y likewise, the canonical correlations ρ are the singular values of U_xᵀU_y, and
   the canonical variates of X are h = U_x A with A its left singular vectors.
3. PWCCA = Σ αᵢρᵢ / Σ αᵢ with αᵢ = Σⱼ |⟨hᵢ, xⱼ⟩| over the columns of X: correlations count by how much of X
   they account for, so the value depends on which of the two is X.

It is biased upwards wherever directions are many for the rows: hold it against the value of shuffled rows.

Source: Morcos et al. 2018 (arXiv:1806.05759), section 3; the cut is that of Raghu et al. 2017
(arXiv:1706.05806), section 2.
"""

import torch
from torch import Tensor

from mechdiff.errors import FitError
from mechdiff.functional.stats import Interval, jackknife

KEEP = 0.99
"""Share of the variance of each side that is kept."""
BLOCKS = 20
"""Blocks of rows that are left out in turn for an interval."""


def pwcca(x: Tensor, y: Tensor, keep: float = KEEP) -> Tensor:
    """Measure PWCCA of y with respect to x.

    Args:
        x: `(rows, d_x)`.
        y: `(rows, d_y)`, the same rows.
        keep: Share of each side's variance that is kept, above 0, at most 1.

    Returns:
        A float64 scalar, 0 to 1; 1 if y is an invertible linear map of what is kept of x.

    Raises:
        FitError: If a side does not vary, or has so many directions that any two sets agree.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
    >>> round(pwcca(x, 3 * x.flip(1) + 1, keep=1.0).item(), 9)
    1.0
    """
    assert x.ndim == y.ndim == 2, "expected (rows, width) twice"
    assert len(x) == len(y), f"{len(x)} rows against {len(y)}"
    assert 0 < keep <= 1, f"keep is {keep}"
    (u_x, left), (u_y, _) = (_directions(side, keep) for side in (x, y))
    most = u_x.shape[1] + u_y.shape[1]
    if most >= len(x):
        raise FitError(
            f"PWCCA of {len(x)} rows with {most} directions is undefined; fewer or more are needed"
        )
    a, rho, _ = torch.linalg.svd(u_x.T @ u_y, full_matrices=False)
    weight = ((u_x @ a).T @ left).abs().sum(1)
    return (weight * rho.clamp(max=1)).sum() / weight.sum()


def pwcca_jackknife(x: Tensor, y: Tensor, blocks: list[list[int]], keep: float = KEEP) -> Interval:
    """Measure PWCCA with an interval from leaving out blocks of rows in turn.

    Args:
        x: `(rows, d_x)`.
        y: `(rows, d_y)`, the same rows.
        blocks: Rows of each block; whole prompts, in a drawn order.
        keep: As in `pwcca`.

    Raises:
        FitError: As `pwcca`.

    >>> x = torch.arange(24.0).reshape(12, 2).sin()
    >>> [round(v, 6) for v in pwcca_jackknife(x, 2 * x, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])]
    [1.0, 1.0, 1.0, 3]
    """
    everything = torch.ones(len(x), dtype=torch.bool)
    values = []
    for block in blocks:
        rest = everything.clone()
        rest[block] = False
        values.append(pwcca(x[rest], y[rest], keep))
    return jackknife(torch.stack(values), pwcca(x, y, keep).item())


def _directions(states: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of the rows' main directions, and the states in them."""
    states = states.detach().to("cpu", torch.float64)
    centred = states - states.mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    if not s[0] > 1e-14 * states.abs().max() * len(states):
        raise FitError(f"PWCCA is undefined: a side does not vary over {len(states)} rows")
    count = int((share < keep - 1e-12).sum()) + 1
    count = min(count, int((s > 1e-10 * s[0]).sum()))
    return u[:, :count], (u[:, :count] * s[:count]) @ v[:count]
