"""The edits of a handle: what becomes of a state, given what is known of its site.

1. `add` moves it by a fixed shift; `interchange` and `reverse` move its component in a subspace to another
   model's, `mapped` to that of a mapped state; `amplify` stretches that component; `ablate` sets it to that
   of a mean.
2. They are computed in float32 or better and rounded to the type of the state last. α = 0 and a basis of no
   rows return the state bit for bit.

Source: `mechdiff.functional.steering` of every projection; Panickssery et al. 2023 (arXiv:2312.06681) of
adding a difference in means.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mechdiff.errors import FitError
from mechdiff.functional.clt import AffineMap, map_states
from mechdiff.functional.steering import interchange, orthonormal, project_in, project_out

Kind = Literal["add", "interchange", "mapped", "amplify", "ablate", "reverse", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Known(NamedTuple):
    """What an edit may need to know of a site.

    Attributes:
        basis: Orthonormal rows, `(k, d)`, or `(batch, k, d)` with states `(batch, T, d)`; for `add`, None is
            the direction of `delta` itself.
        delta: The whole natural shift, `(d,)`, for `add`.
        neutral: Mean of neutral states, `(d,)`, for `ablate`.
        affine: Map to the states of the other model, for `mapped`.
    """

    basis: Tensor | None = None
    delta: Tensor | None = None
    neutral: Tensor | None = None
    affine: AffineMap | None = None


def check_edit(kind: str, alpha: float) -> None:
    """Refuse an edit that does not exist.

    Raises:
        FitError: If the kind is unknown, or the strength is not allowed with it.

    >>> check_edit("add", 0.5)
    """
    if kind not in KINDS:
        raise FitError(f"kind is {kind!r}; allowed: {', '.join(KINDS)} (key: kind)")
    if kind == "ablate" and alpha not in (0, 1):
        raise FitError(f"alpha is {alpha} with kind ablate; allowed: 1 (key: alpha)")


def change(h: Tensor, kind: str, known: Known, donor: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Edit states.

    Args:
        h: `(..., d)`.
        kind: `add` h + αΔ, Δ of the length of `delta` along a basis of one row; `interchange` and `reverse`
            h + αP(h' − h) with h' the donor, `mapped` with h' the mapped state; `amplify` h + αPh; `ablate`
            h − P(h − c) with c the neutral mean, at α = 1 only; `none`.
        known: What is known of the site.
        donor: The other model's states, of the shape of `h`.
        alpha: Strength; 1 is the whole natural edit.

    Returns:
        Like `h`.

    Raises:
        FitError: If the kind, the strength or the rank is not allowed, or the basis not orthonormal.

    >>> h, line = torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 1.0]])
    >>> change(h, "add", Known(line, delta=torch.tensor([2.0, 0.0])), alpha=0.5).tolist()
    [3.0, 5.0]
    >>> change(h, "ablate", Known(line, neutral=torch.tensor([9.0, 1.0]))).tolist()
    [3.0, 1.0]
    """
    check_edit(kind, alpha)
    basis = known.basis
    if kind == "none" or alpha == 0 or (basis is not None and not basis.shape[-2]):
        return h
    if kind == "add":
        return _add(h, known, alpha)
    assert basis is not None, f"{kind} needs a basis"
    if kind == "amplify":
        return project_in(h, basis, alpha)
    if kind == "ablate":
        assert known.neutral is not None, "ablate needs the mean of neutral states"
        return project_out(h, basis, known.neutral)
    if kind == "mapped":
        assert known.affine is not None, "mapped needs a map"
        exact = h.to(torch.promote_types(h.dtype, torch.float32))
        affine = AffineMap(known.affine.weight.to(exact), known.affine.bias.to(exact))
        return interchange(h, map_states(exact, affine), basis, alpha)
    assert donor is not None, f"{kind} needs the states of the other model"
    return interchange(h, donor, basis, alpha)


def _add(h: Tensor, known: Known, alpha: float) -> Tensor:
    assert known.delta is not None, "add needs a shift"
    exact, shift, basis = h.to(torch.promote_types(h.dtype, torch.float32)), known.delta, known.basis
    if basis is not None:
        if basis.shape[-2] != 1:
            got = f"k is {basis.shape[-2]} with kind add"
            raise FitError(f"{got}; allowed: 1, a shift has one direction (key: k)")
        line = orthonormal(basis)
        shift = shift.norm() * (line if line.ndim == 3 else line[0]).to(shift)
    return (exact + alpha * shift.to(exact)).to(h.dtype)
