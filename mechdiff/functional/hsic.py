"""HSIC of linear kernels, biased and unbiased, with all values that leave one prompt out.

`mechdiff.functional.cka` says what is computed. Some rows are taken at a time: beside the states, memory is
prompts × prompts.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mechdiff.errors import FewPromptsError, FitError
from mechdiff.functional.stats import Groups, group_index

Form = Literal["auto", "gram", "feature"]

_BLOCK = 1024  # rows of K and L held at a time


class Distinct(NamedTuple):
    """Sums over rows of distinct prompts.

    Attributes:
        pairs: Over pairs, by the first row, `(rows,)`.
        triples: Over triples, by the row in both kernels, `(rows,)`.
        k_pair: Means of K over the rows of each two prompts, `(prompts, prompts)`.
        m_pair: The same of L.
        without: All triples but those with each prompt, `(prompts,)`.
    """

    pairs: Tensor
    triples: Tensor
    k_pair: Tensor
    m_pair: Tensor
    without: Tensor


class Parts:
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
        self.blocks = [slice(i, i + _BLOCK) for i in range(0, len(x), _BLOCK)]
        self._means: dict[str, Tensor] = {}

    def check(self, least: int) -> None:
        """Refuse fewer prompts than the estimator has to choose from."""
        if self.count < least:
            raise FewPromptsError(f"CKA over {self.count} prompts is undefined; at least {least} are needed")

    def biased(self, a: str, b: str) -> Tensor:
        """Biased HSIC; the means of centred kernels vanish, so one term is left."""
        return self._products(a, b).sum() / self.count**2

    def distinct(self, a: str, b: str) -> Distinct:
        """Sum over distinct pairs and triples, and average K and L over prompts."""
        pairs, w = self._products(a, b) - self._own_products(a, b), self.weight
        k_pair, m_pair = w.new_zeros(2, self.count, self.count)
        by_k, by_m, by_both = w.new_zeros(3, self.count)
        triples = []
        for rows, k, m in self._kernels(a, b):
            index, v = self.index[rows], w[rows]
            k, m = (part.scatter(1, index[:, None], 0.0) for part in (k, m))
            k_row, m_row, both = k.sum(1), m.sum(1), k * m
            triples.append(v * (k_row * m_row - both.sum(1)))
            k_pair.index_add_(0, index, k * v[:, None])
            m_pair.index_add_(0, index, m * v[:, None])
            by_k += (v * k_row) @ m
            by_m += (v * m_row) @ k
            by_both += v @ both
        three = torch.cat(triples)
        without = three.sum() - self._by_group(three) - by_k - by_m + 2 * by_both
        return Distinct(pairs, three, k_pair, m_pair, without)

    def debiased(self, sums: Distinct) -> Tensor:
        """Unbiased HSIC, a sum over distinct prompts."""
        k_pair, m_pair = sums.k_pair, sums.m_pair
        fours = k_pair.sum() * m_pair.sum() - 4 * k_pair.sum(1) @ m_pair.sum(1) + 2 * (k_pair * m_pair).sum()
        return _combine(sums.pairs.sum(), sums.triples.sum(), fours, self.count)

    def debiased_without_each(self, sums: Distinct) -> Tensor:
        """Unbiased HSIC without each prompt in turn, `(prompts,)`."""
        k_pair, m_pair = sums.k_pair, sums.m_pair
        k_sum, m_sum, both = k_pair.sum(1), m_pair.sum(1), k_pair * m_pair
        pairs = sums.pairs.sum() - 2 * self._by_group(sums.pairs)
        # Over the prompts b that stay when a goes: the sum of (k_sum_b - k_ab)(m_sum_b - m_ab).
        joined = k_sum @ m_sum - k_sum * m_sum - k_pair @ m_sum - m_pair @ k_sum + both.sum(1)
        outer = (k_sum.sum() - 2 * k_sum) * (m_sum.sum() - 2 * m_sum)
        fours = outer - 4 * joined + 2 * (both.sum() - 2 * both.sum(1))
        return _combine(pairs, sums.without, fours, self.count - 1)

    def biased_without_each(self, a: str, b: str) -> Tensor:
        """Biased HSIC without each prompt in turn, `(prompts,)`; what is left is centred anew."""
        products, own = self._products(a, b), self._own_products(a, b)
        w, rest = self.weight, self.count - 1
        pairs = products.sum() - 2 * self._by_group(products) + self._by_group(own)
        k_pair, m_pair = w.new_zeros(2, self.count, self.count)
        triples = w.new_zeros(self.count)
        for rows, k, m in self._kernels(a, b):
            index, v = self.index[rows], w[rows]
            kept = index[:, None] != torch.arange(self.count, device=w.device)
            triples += v @ ((k.sum(1, keepdim=True) - k) * (m.sum(1, keepdim=True) - m) * kept)
            k_pair.index_add_(0, index, k * v[:, None])
            m_pair.index_add_(0, index, m * v[:, None])
        sums = [p.sum() - 2 * p.sum(1) + p.diagonal() for p in (k_pair, m_pair)]
        return pairs / rest**2 - 2 * triples / rest**3 + sums[0] * sums[1] / rest**4

    def _centred(self, states: Tensor, side: str) -> Tensor:
        name = {"x": "source", "y": "target"}[side]
        states = states.detach().to(torch.float64, copy=True)
        assert bool(states.isfinite().all()), f"the {name} states are not finite"
        whole = states.square().mean().sqrt()
        states -= self.weight @ states / self.count
        size = states.square().mean().sqrt()
        if not size > 1e-14 * whole:
            raise FitError(f"CKA is undefined: the {name} states do not vary over {self.count} prompts")
        self.size[side] = size.item()
        return states.div_(size)  # scale drops out; this keeps fourth powers in range

    def _products(self, a: str, b: str) -> Tensor:
        """For each row i, wᵢ Σⱼ wⱼ KᵢⱼLᵢⱼ."""
        x, y, w = self.states[a], self.states[b], self.weight
        if self.gram:
            return w * torch.cat([((x[i] @ x.T) * (y[i] @ y.T)) @ w for i in self.blocks])
        cross = sum((x[i] * w[i, None]).T @ y[i] for i in self.blocks)
        return w * torch.cat([((x[i] @ cross) * y[i]).sum(1) for i in self.blocks])

    def _own_products(self, a: str, b: str) -> Tensor:
        """The part of `_products` whose two rows share a prompt."""
        x, y, w = self.states[a], self.states[b], self.weight
        if self.count == len(x):
            return x.square().sum(1) * y.square().sum(1)
        groups = zip(x.split(self.sizes), y.split(self.sizes), w.split(self.sizes), strict=True)
        return torch.cat([v * (((p @ p.T) * (q @ q.T)) @ v) for p, q, v in groups])

    def _kernels(self, a: str, b: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield some rows and the means of K and L between them and each prompt, `(rows, prompts)`."""
        x, y = self.states[a], self.states[b]
        for rows in self.blocks:
            yield rows, x[rows] @ self._mean(a).T, y[rows] @ self._mean(b).T

    def _mean(self, a: str) -> Tensor:
        """Mean state of each prompt, `(prompts, d)`."""
        if a not in self._means:
            x = self.states[a]
            self._means[a] = x.new_zeros(self.count, x.shape[1])
            for rows in self.blocks:
                self._means[a].index_add_(0, self.index[rows], x[rows] * self.weight[rows, None])
        return self._means[a]

    def _by_group(self, rows: Tensor) -> Tensor:
        """Sum a number per row over each prompt."""
        return rows.new_zeros(self.count).index_add_(0, self.index, rows)


def _combine(pairs: Tensor, triples: Tensor, fours: Tensor, n: int) -> Tensor:
    """Turn sums over distinct 2, 3 and 4 of n prompts into the U-statistic."""
    two, three, four = (math.perm(n, r) for r in (2, 3, 4))
    return pairs / two + fours / four - 2 * triples / three
