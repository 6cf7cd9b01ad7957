"""Linear CKA between two sets of activations of the same rows, biased and debiased.

1. K = XXᵀ and L = YYᵀ are linear kernels; CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) · HSIC(L, L)). X and Y are
   centred first.
2. Rows come in groups (prompts; one row each if none are given). A row of a group of m rows weighs w = 1/m,
   so every prompt counts the same. Let G be the number of groups, and a sum over "distinct" rows one whose
   rows all lie in different groups.
3. Biased HSIC = Σᵢⱼ wᵢwⱼ KᵢⱼLᵢⱼ / G² on centred rows. It is near 1 for unrelated data whenever rows are fewer
   than dimensions.
4. Debiased HSIC = A + C − 2B with A the mean of KᵢⱼLᵢⱼ over distinct (i, j), B that of KᵢⱼLᵢᵣ over distinct
   (i, j, r), and C that of KᵢⱼLᵣₛ over distinct (i, j, r, s): the U-statistic of order 4 over prompts, so
   pairs of rows of one prompt never enter. With one row per prompt it is [tr K̃L̃ + ΣK̃ΣL̃/((n−1)(n−2)) −
   2·1ᵀK̃L̃1/(n−2)] / (n(n−3)), where ~ sets the diagonal to zero. It can be negative.
5. Within classes (languages, kinds of prompt) the HSIC of each class is taken on its own rows, and their
   mean, weighted by prompts, takes its place: what tells classes apart cannot count as likeness. Centring on
   class means and pooling would leave a bias of (d/prompts of a class)² in every term.
6. Every term needs only Σⱼ wⱼKᵢⱼLᵢⱼ (from Gram blocks or from features, whichever is smaller) and the rows ×
   prompts means of K and L, some rows at a time, and so do all delete-one-prompt values at once.

Float64 throughout. Beside the states, memory is prompts × prompts for the debiased value and the jackknife.

Source: Kornblith et al. 2019 (arXiv:1905.00414), section 3, for CKA; Song et al. 2012 (JMLR 13), section 2,
for the unbiased HSIC; Nguyen et al. 2021 (arXiv:2010.15327) for their combination. The grouped form is the
same U-statistic with prompts as units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.errors import FewPromptsError, FitError
from mechdiff.functional.hsic import Form, Parts
from mechdiff.functional.stats import Groups, Interval, group_index, jackknife


class Standardized(NamedTuple):
    """States with mean 0 and standard deviation 1, and what undoes it.

    Attributes:
        states: `(rows, d_model)`.
        mean: `(d_model,)`.
        scale: Standard deviation, 1 where a dimension is constant, `(d_model,)`.
    """

    states: Tensor
    mean: Tensor
    scale: Tensor


def standardize(states: Tensor) -> Standardized:
    """Centre every dimension and divide it by its standard deviation.

    Args:
        states: `(rows, d_model)`. Half precision is computed and returned in float32.

    >>> standardize(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).states.round(decimals=4).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    mean = states.mean(0)
    centred = states - mean
    scale = centred.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return Standardized(centred / scale, mean, scale)


def linear_cka(
    x: Tensor, y: Tensor, *, debiased: bool = False, groups: Groups | None = None, form: Form = "auto"
) -> Tensor:
    """Measure the linear CKA of two sets of activations.

    Args:
        x: `(rows, d_x)`.
        y: `(rows, d_y)`, the same rows.
        debiased: Use the unbiased HSIC; needs 4 prompts.
        groups: Prompt of each row, `(rows,)`.
        form: Compute from Gram blocks, from features, or from whichever is smaller. The value is the same.

    Returns:
        A float64 scalar. 1 if x and y are equal up to rotation, isotropic scale and shift; 0 in expectation,
        if debiased, for independent ones.

    Raises:
        FitError: If there are too few prompts, or one side does not vary.

    >>> x = torch.eye(4)
    >>> round(linear_cka(x, 3 * x.flip(1) + 1).item(), 12)
    1.0
    """
    parts = Parts(x, y, groups, form)
    parts.check(4 if debiased else 2)
    pairs = ("xy", "xx", "yy")
    xy, xx, yy = (parts.debiased(parts.distinct(*p)) if debiased else parts.biased(*p) for p in pairs)
    return _ratio(xy, xx, yy)


def cka_from_sums(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Measure the biased linear CKA from centred sums of products, whatever the number of rows behind them.

    Args:
        xy: XᵀY of centred states, `(d_x, d_y)`.
        xx: XᵀX, `(d_x, d_x)`.
        yy: YᵀY, `(d_y, d_y)`.

    Raises:
        FitError: If one side does not vary.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> cka_from_sums(x.T @ (3 * x), x.T @ x, 9 * x.T @ x).item()
    1.0
    """
    sizes = xx.norm() * yy.norm()
    if not sizes > 0:
        raise FitError("CKA is undefined: one side does not vary")
    return xy.square().sum() / sizes


def cka_jackknife(
    x: Tensor,
    y: Tensor,
    *,
    debiased: bool = True,
    groups: Groups | None = None,
    within: Groups | None = None,
    form: Form = "auto",
) -> Interval:
    """Measure linear CKA with a delete-one-prompt jackknife interval.

    A bootstrap would repeat rows, and a repeated row is its own best match: its intervals exclude a true 0.

    Args:
        x: `(rows, d_x)`.
        y: `(rows, d_y)`, the same rows.
        debiased: Use the unbiased HSIC; needs 5 prompts.
        groups: Prompt of each row, `(rows,)`; whole prompts are deleted.
        within: Class of each row, `(rows,)`, the same for all rows of a prompt: compare within classes.
            Classes with fewer prompts than needed are left out.
        form: As in `linear_cka`.

    Raises:
        FitError: If there are too few prompts, or one side does not vary.

    >>> x = torch.arange(12.0).reshape(6, 2).sin()
    >>> [round(v, 6) for v in cka_jackknife(x, 2 * x)]
    [1.0, 1.0, 1.0, 6]
    """
    without, full = _leave_one_out(x, y, debiased, groups, within, form)
    return jackknife(without, full.item())


def cka_contrast(
    a: Tensor,
    b: Tensor,
    x: Tensor,
    *,
    debiased: bool = True,
    groups: Groups | None = None,
    within: Groups | None = None,
) -> Interval:
    """Measure CKA(a, x) − CKA(b, x) on the same rows, with a delete-one-prompt jackknife interval.

    Args:
        a: `(rows, d_a)`.
        b: `(rows, d_b)`.
        x: `(rows, d_x)`, what both are compared with.
        debiased: As in `cka_jackknife`, as the other arguments.
        groups: Prompt of each row.
        within: Class of each row.

    Raises:
        FitError: If there are too few prompts, or one side does not vary.

    >>> a = torch.arange(12.0).reshape(6, 2).sin()
    >>> [abs(round(v, 6)) for v in cka_contrast(a, 3 * a, a.cos())]
    [0.0, 0.0, 0.0, 6]
    """
    (of_a, all_a), (of_b, all_b) = (_leave_one_out(s, x, debiased, groups, within, "auto") for s in (a, b))
    return jackknife(of_a - of_b, (all_a - all_b).item())


def _leave_one_out(
    x: Tensor, y: Tensor, debiased: bool, groups: Groups | None, within: Groups | None, form: Form
) -> tuple[Tensor, Tensor]:
    """Return CKA without each prompt in turn, `(prompts,)`, and with all."""
    prompt = group_index(groups, len(x))
    classes = torch.zeros(len(x), dtype=torch.int64) if within is None else group_index(within, len(x))
    least = 5 if debiased else 3
    rows = [(classes == c).nonzero().flatten() for c in range(int(classes.max()) + 1)]
    sized = [r for r in rows if len(rows) == 1 or len(prompt[r].unique()) >= least]
    if not sized:
        raise FewPromptsError(f"CKA within classes is undefined: none has {least} prompts")
    parts = [
        Parts(x, y, prompt, form)
        if len(r) == len(x)
        else Parts(x[r.to(x.device)], y[r.to(y.device)], prompt[r], form)
        for r in sized
    ]
    for part in parts:
        part.check(least)
    hsic = [_over_classes(parts, a, b, debiased) for a, b in ("xy", "xx", "yy")]
    return _ratio(*(without for _, without in hsic)), _ratio(*(full for full, _ in hsic))


def _over_classes(parts: Sequence[Parts], a: str, b: str, debiased: bool) -> tuple[Tensor, Tensor]:
    """Sum HSIC times prompts over classes: of all prompts, and without each of them, `(prompts,)`."""
    full, without = [], []
    for part in parts:
        unit = (part.size[a] * part.size[b] / (parts[0].size[a] * parts[0].size[b])) ** 2
        if debiased:
            sums = part.distinct(a, b)
            value, each = part.debiased(sums), part.debiased_without_each(sums)
        else:
            value, each = part.biased(a, b), part.biased_without_each(a, b)
        full.append(unit * part.count * value)
        without.append(unit * (part.count - 1) * each - full[-1])
    total = torch.stack(full).sum()
    return total, total + torch.cat(without)


def _ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    if not bool(((xx > 0) & (yy > 0)).all()):
        raise FewPromptsError(
            "CKA is undefined: a debiased self-similarity is not positive; more prompts are needed"
        )
    return xy / (xx * yy).sqrt()
