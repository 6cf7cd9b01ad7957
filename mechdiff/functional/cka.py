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
   prompts means of K and L, and so do all delete-one-prompt values at once.

Float64 throughout. Memory is rows × prompts for the debiased value and the jackknife.

Source: Kornblith et al. 2019 (arXiv:1905.00414), section 3, for CKA; Song et al. 2012 (JMLR 13), section 2,
for the unbiased HSIC; Nguyen et al. 2021 (arXiv:2010.15327) for their combination. The grouped form is the
same U-statistic with prompts as units.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechdiff.errors import FewPromptsError, FitError
from mechdiff.functional.stats import Groups, Interval, group_index, jackknife

Form = Literal["auto", "gram", "feature"]

_BLOCK = 1024  # rows of K and L held at a time


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
    parts = _Parts(x, y, groups, form)
    parts.check(4 if debiased else 2)
    xy, xx, yy = (parts.debiased(*pair) if debiased else parts.biased(*pair) for pair in ("xy", "xx", "yy"))
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
    parts = [_Parts(x[r.to(x.device)], y[r.to(y.device)], prompt[r], form) for r in sized]
    for part in parts:
        part.check(least)
    hsic = [_over_classes(parts, a, b, debiased) for a, b in ("xy", "xx", "yy")]
    return _ratio(*(without for _, without in hsic)), _ratio(*(full for full, _ in hsic))


def _over_classes(parts: Sequence["_Parts"], a: str, b: str, debiased: bool) -> tuple[Tensor, Tensor]:
    """Sum HSIC times prompts over classes: of all prompts, and without each of them, `(prompts,)`."""
    full, without = [], []
    for part in parts:
        unit = (part.size[a] * part.size[b] / (parts[0].size[a] * parts[0].size[b])) ** 2
        value = part.debiased(a, b) if debiased else part.biased(a, b)
        each = part.debiased_without_each(a, b) if debiased else part.biased_without_each(a, b)
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


class _Parts:
    """Centred states and the sums that every HSIC is made of; a row weighs 1/(size of its group)."""

    def __init__(self, x: Tensor, y: Tensor, groups: Groups | None, form: Form) -> None:
        assert x.ndim == y.ndim == 2, "expected (rows, width) twice"
        assert len(x) == len(y), f"{len(x)} rows against {len(y)}"
        index = group_index(groups, len(x)).to(x.device)
        order = index.argsort(stable=True)
        self.sizes: list[int] = index.bincount().tolist()
        self.index, self.count = index[order], len(self.sizes)
        self.weight = 1 / torch.tensor(self.sizes, dtype=torch.float64, device=x.device)[self.index]
        self.size: dict[str, float] = {}
        self.states = {side: self._centred(s[order], side) for side, s in (("x", x), ("y", y))}
        self.gram = form == "gram" or (form == "auto" and len(x) <= max(x.shape[1], y.shape[1]))
        self._cross: dict[str, Tensor] = {}

    def check(self, least: int) -> None:
        """Refuse fewer prompts than the estimator has to choose from."""
        if self.count < least:
            raise FewPromptsError(f"CKA over {self.count} prompts is undefined; at least {least} are needed")

    def biased(self, a: str, b: str) -> Tensor:
        """Biased HSIC; the means of centred kernels vanish, so one term is left."""
        return self._products(a, b).sum() / self.count**2

    def debiased(self, a: str, b: str) -> Tensor:
        """Unbiased HSIC, a sum over distinct prompts."""
        products, rows, k, m = self._distinct_sums(a, b)
        k_pair, m_pair = self._by_group(k, self.weight), self._by_group(m, self.weight)
        fours = k_pair.sum() * m_pair.sum() - 4 * k_pair.sum(1) @ m_pair.sum(1) + 2 * (k_pair * m_pair).sum()
        return _combine(products.sum(), rows.sum(), fours, self.count)

    def debiased_without_each(self, a: str, b: str) -> Tensor:
        """Unbiased HSIC without each prompt in turn, `(prompts,)`."""
        products, rows, k, m = self._distinct_sums(a, b)
        w, k_pair, m_pair = self.weight, self._by_group(k, self.weight), self._by_group(m, self.weight)
        k_sum, m_sum, both = k_pair.sum(1), m_pair.sum(1), k_pair * m_pair
        pairs = products.sum() - 2 * self._by_group(products)
        triples = (
            rows.sum() - self._by_group(rows) - (w * k.sum(1)) @ m - (w * m.sum(1)) @ k + 2 * w @ (k * m)
        )
        # Over the prompts b that stay when a goes: the sum of (k_sum_b - k_ab)(m_sum_b - m_ab).
        joined = k_sum @ m_sum - k_sum * m_sum - k_pair @ m_sum - m_pair @ k_sum + both.sum(1)
        outer = (k_sum.sum() - 2 * k_sum) * (m_sum.sum() - 2 * m_sum)
        fours = outer - 4 * joined + 2 * (both.sum() - 2 * both.sum(1))
        return _combine(pairs, triples, fours, self.count - 1)

    def biased_without_each(self, a: str, b: str) -> Tensor:
        """Biased HSIC without each prompt in turn, `(prompts,)`; what is left is centred anew."""
        products, own = self._products(a, b), self._own_products(a, b)
        k, m, w, rest = self._means(a), self._means(b), self.weight, self.count - 1
        pairs = products.sum() - 2 * self._by_group(products) + self._by_group(own)
        kept = self.index[:, None] != torch.arange(self.count, device=w.device)
        triples = w @ ((k.sum(1, keepdim=True) - k) * (m.sum(1, keepdim=True) - m) * kept)
        sums = [p.sum() - 2 * p.sum(1) + p.diagonal() for p in (self._by_group(k, w), self._by_group(m, w))]
        return pairs / rest**2 - 2 * triples / rest**3 + sums[0] * sums[1] / rest**4

    def _centred(self, states: Tensor, side: str) -> Tensor:
        name = {"x": "source", "y": "target"}[side]
        states = states.detach().to(torch.float64)
        assert bool(states.isfinite().all()), f"the {name} states are not finite"
        centred = states - self.weight @ states / self.count
        size = centred.square().mean().sqrt()
        if not size > 1e-14 * states.square().mean().sqrt():
            raise FitError(f"CKA is undefined: the {name} states do not vary over {self.count} prompts")
        self.size[side] = size.item()
        return centred.div_(size)  # scale drops out; this keeps fourth powers in range

    def _products(self, a: str, b: str) -> Tensor:
        """For each row i, wᵢ Σⱼ wⱼ KᵢⱼLᵢⱼ."""
        x, y, w = self.states[a], self.states[b], self.weight
        if not self.gram:
            return w * (x @ ((x * w[:, None]).T @ y)).mul_(y).sum(1)
        blocks = [
            ((x[i : i + _BLOCK] @ x.T) * (y[i : i + _BLOCK] @ y.T)) @ w for i in range(0, len(x), _BLOCK)
        ]
        return w * torch.cat(blocks)

    def _own_products(self, a: str, b: str) -> Tensor:
        """The part of `_products` whose two rows share a prompt."""
        x, y, w = self.states[a], self.states[b], self.weight
        if self.count == len(x):
            return x.square().sum(1) * y.square().sum(1)
        groups = zip(x.split(self.sizes), y.split(self.sizes), w.split(self.sizes), strict=True)
        return torch.cat([v * (((p @ p.T) * (q @ q.T)) @ v) for p, q, v in groups])

    def _distinct_sums(self, a: str, b: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum over distinct pairs and triples, row by row, and average K and L over other prompts."""
        k, m = (self._means(name).scatter(1, self.index[:, None], 0.0) for name in (a, b))
        triples = self.weight * (k.sum(1) * m.sum(1) - (k * m).sum(1))
        return self._products(a, b) - self._own_products(a, b), triples, k, m

    def _means(self, a: str) -> Tensor:
        """Mean of K between each row and each prompt, `(rows, prompts)`."""
        if a not in self._cross:
            x = self.states[a]
            self._cross[a] = x @ self._by_group(x, self.weight).T
        return self._cross[a]

    def _by_group(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Sum rows (times weight) over each prompt."""
        weighted = rows if weight is None else rows * (weight[:, None] if rows.ndim == 2 else weight)
        return rows.new_zeros(self.count, *rows.shape[1:]).index_add_(0, self.index, weighted)


def _combine(pairs: Tensor, triples: Tensor, fours: Tensor, n: int) -> Tensor:
    """Turn sums over distinct 2, 3 and 4 of n prompts into the U-statistic."""
    two, three, four = (math.perm(n, r) for r in (2, 3, 4))
    return pairs / two + fours / four - 2 * triples / three
