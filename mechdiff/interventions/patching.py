"""Replace activations of a running model by given ones.

1. A donor is addressed by row of the batch and by absolute position: its column p is for the token at
   position p. Without padding, and with padding on the right, that is the column of the batch; with a cache
   each step takes the columns of the tokens that it runs, and tokens beyond the donor stay untouched.
2. Across models a head is exchanged by its contribution to the residual (`head_out`): a changed output
   projection does not show in the head's input to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from mechdiff.errors import UsageError
from mechdiff.interventions.hooks import Edit, get_blocks, intervene, num_heads
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.interventions.suffix import run_logits


def _locate(where: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find row and column of `where` for every token, and whether it is chosen, each `(batch, position)`."""
    rows, length = where.shape
    if rows not in (1, positions.shape[0]):
        raise UsageError(f"where has {rows} rows; allowed: 1 or {positions.shape[0]} (key: where)")
    row = torch.arange(positions.shape[0], device=positions.device)[:, None] % rows
    column = positions.clamp(max=length - 1)
    return row, column, where.to(positions.device)[row, column] & (positions < length)


def replace(donor: Tensor, where: Tensor) -> Edit:
    """Make an edit that puts a donor's activation where it is wanted.

    Args:
        donor: `(rows, T, ...)`; column p is for the token at absolute position p. One row serves every row.
        where: `(rows, T)` boolean; False leaves the activation bitwise as it is.

    Raises:
        UsageError: If the shapes of donor and `where` disagree, or, in the forward pass, those of donor and
            activation.
    """
    if donor.shape[:2] != where.shape or where.dtype != torch.bool:
        got = f"{tuple(where.shape)} {where.dtype}"
        raise UsageError(f"where is {got}; allowed: {tuple(donor.shape[:2])} torch.bool (key: where)")

    def edit(value: Tensor, positions: Tensor) -> Tensor:
        if donor.shape[2:] != value.shape[2:]:
            raise UsageError(
                f"donor is {tuple(donor.shape)}; allowed: (rows, T, *{tuple(value.shape[2:])}) (key: donor)"
            )
        row, column, chosen = _locate(where, positions)
        chosen = chosen.reshape(*chosen.shape, *[1] * (value.ndim - 2))
        return torch.where(chosen, donor.to(value)[row, column], value)

    return edit


def layer_patch_crossmodel(
    recipient: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    site: Site,
    donor: Tensor,
    where: Tensor,
    *,
    logits_at: Tensor | None = None,
) -> Tensor:
    """Run the recipient in full with the donor's activations at one site.

    `SuffixEngine.resume` gives the same logits for less; this is the plain way, for any component.

    Args:
        recipient: The model that runs.
        input_ids: `(rows, T)`, padded on the right.
        attention_mask: `(rows, T)`, or None when there is no padding.
        site: What is replaced.
        donor: The other model's activations at that site, `(rows, T, ...)`; see `replace`.
        where: `(rows, T)` boolean, False = untouched.
        logits_at: Columns to give logits for, `(rows,)` or `(rows, m)`; None: the last.

    Returns:
        Logits `(rows, vocab)`, or `(rows, m, vocab)` if `logits_at` has two axes.

    Raises:
        SiteError: If the recipient has no such site.
        UsageError: If shapes disagree or padding is not on the right.
    """
    with intervene(recipient, {site: replace(donor, where)}):
        return run_logits(recipient, input_ids, attention_mask, logits_at)


@contextmanager
def head_patch_or_zero(
    model: nn.Module,
    layer: int,
    head: int,
    mode: Literal["zero", "swap"] = "zero",
    donor: Tensor | None = None,
    where: Tensor | None = None,
) -> Iterator[None]:
    """Silence one attention head, or exchange its contribution to the residual, within the context.

    Args:
        model: The model that runs.
        layer: Block of the head.
        head: Query head.
        mode: `zero` sets the head's input to the output projection to 0; `swap` puts the donor's `head_out`.
        donor: For `swap`: what the head contributes in the other model, `(rows, T, d_model)`; see `replace`.
        where: `(rows, T)` boolean, False = untouched; None: every position (of the donor, for `swap`).

    Raises:
        SiteError: If the layer does not exist.
        UsageError: If the head or the mode does not exist, or donor and mode do not fit.
    """
    check_layers([Site(layer)], len(get_blocks(model)))
    heads = num_heads(model)
    if not 0 <= head < heads:
        raise UsageError(f"head {head} is out of range; allowed: 0 to {heads - 1} (key: head)")
    if mode not in ("zero", "swap") or (mode == "swap") == (donor is None):
        given = "no donor" if donor is None else "a donor"
        raise UsageError(f"mode {mode!r} with {given}; allowed: 'zero' without, 'swap' with one (key: mode)")

    def new(part: Tensor, positions: Tensor) -> Tensor:
        if donor is not None:
            every = torch.ones(donor.shape[:2], dtype=torch.bool)
            return replace(donor, every if where is None else where)(part, positions)
        chosen = (
            torch.ones_like(positions, dtype=torch.bool) if where is None else _locate(where, positions)[2]
        )
        return part.masked_fill(chosen[..., None], 0)

    def edit(value: Tensor, positions: Tensor) -> Tensor:
        return torch.cat(
            [value[:, :, :head], new(value[:, :, head], positions)[:, :, None], value[:, :, head + 1 :]], 2
        )

    with intervene(model, {Site(layer, "head_z" if donor is None else "head_out"): edit}):
        yield
