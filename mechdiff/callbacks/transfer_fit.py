"""Fit handles on the prompts of single languages, from stored activations and in closed form.

1. The subspace is that of the uncentred SVD of tuned − base on the language's target prompts.
2. The map from base's to tuned's states is a ridge map on all of its prompts, shrunk to the identity, with
   the strength that errs least on held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mechdiff.data.activations import ActivationPairs
from mechdiff.functional.clt import AffineMap, map_states, ridge_path_rows
from mechdiff.functional.steering import paired_svd

ALL = "all"
"""Stands for all languages together."""


class Fit(NamedTuple):
    """A handle fitted on the prompts of one language.

    Attributes:
        basis: Orthonormal rows, `(k, d)`.
        affine: Map from base's to tuned's states.
        prompts: Number of target prompts behind the basis.
    """

    basis: Tensor
    affine: AffineMap | None
    prompts: int


class StoredRows(NamedTuple):
    """Stored rows of one site at the last position, with the language and class of their prompts."""

    base: Tensor
    tuned: Tensor
    target: Tensor
    prompt: Tensor
    lang: list[str]

    def of(self, lang: str) -> StoredRows:
        """Return the rows of one language, or of all."""
        kept = torch.tensor([lang in (ALL, name) for name in self.lang], dtype=torch.bool)
        langs = [name for name in self.lang if lang in (ALL, name)]
        return StoredRows(self.base[kept], self.tuned[kept], self.target[kept], self.prompt[kept], langs)


def fit_languages(
    data: ActivationPairs, site: str, languages: Sequence[str], k: int, lambdas: Sequence[float]
) -> dict[str, Fit]:
    """Fit on each language alone, and on all; those with fewer than k target prompts are left out.

    Args:
        data: The stored activations.
        site: Where.
        languages: Languages to fit on.
        k: Number of directions.
        lambdas: Ridge strengths to choose from.
    """
    train, val = (stored_rows(data, split, site) for split in ("train", "val"))
    found = {}
    for name in (*languages, ALL):
        kept, held = train.of(name), val.of(name)
        change = (kept.tuned.double() - kept.base.double())[kept.target]
        if len(change) < k:
            continue
        affine = _map(kept, held if len(held.lang) else val, lambdas)
        prompts = len(kept.prompt[kept.target].unique())
        found[name] = Fit(paired_svd(change, k).basis.float(), affine, prompts)
    return found


def stored_rows(data: ActivationPairs, split: str, site: str) -> StoredRows:
    """Read the last positions of one split at one site.

    Args:
        data: The stored activations.
        split: ``train``, ``val`` or ``test``.
        site: Where.
    """
    batch = data.read(data.rows(split, ["last"]))
    examples = [data.prompts[i] for i in batch["prompt"].tolist()]
    source = data.source_sites[data.sites.index(site)]
    target = torch.tensor([example.label == "target" for example in examples], dtype=torch.bool)
    langs = [example.lang for example in examples]
    return StoredRows(batch["source"][source], batch["target"][site], target, batch["prompt"], langs)


def _map(train: StoredRows, val: StoredRows, lambdas: Sequence[float]) -> AffineMap:
    """Fit the ridge map whose error on held-out rows is smallest; the strongest of equals."""
    path = ridge_path_rows(train.base.double(), train.tuned.double(), lambdas, shrink="identity")
    base, tuned = val.base.double(), val.tuned.double()
    errors = [float((map_states(base, path.map(i)) - tuned).square().sum()) for i in range(len(lambdas))]
    return path.map(min(range(len(lambdas)), key=lambda i: (errors[i], -lambdas[i])))
