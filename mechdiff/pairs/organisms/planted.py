"""What a planted difference is: a copy of a model with a change, and what was changed.

A copy shares the storage of every tensor that was not edited with its base, and none that was, so that a base
serves any number of planted siblings and is never changed itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from mechdiff.errors import PairError
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.pairs.spec import PairSpec


@dataclass(frozen=True)
class Truth:
    """What was planted.

    Attributes:
        kind: ``weights``, ``policy``, ``relay``, ``heads``, ``vocabulary``, ``null_copy`` or ``null_bf16``.
        seed: Seed of the draws.
        strength: In the unit of the function that planted it; 0 for a null.
        components: The smallest components that contain the change; none for a null.
        layers: The blocks that contain it, ascending.
        rank: Rank of the change of each matrix or of the policy; None for full rank.
        directions: What a policy writes, orthonormal rows ``(rank, d_model)``, on the CPU.
        heads: Changed heads as ``(layer, head)``.
        tensors: Names of the edited tensors.
    """

    kind: str
    seed: int
    strength: float
    components: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    rank: int | None = None
    directions: Tensor | None = field(default=None, compare=False)
    heads: tuple[tuple[int, int], ...] = ()
    tensors: tuple[str, ...] = ()


Planted = tuple[LoadedModel, Truth]


def planted_pair(base: LoadedModel, tuned: LoadedModel, name: str = "planted") -> LoadedPair:
    """Make a pair of two models in memory."""
    pair = LoadedPair(PairSpec(name=name), base.device)
    pair.base, pair.tuned = base, tuned
    return pair


def copy_model(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a frozen model with parameters of its own over the same storage.

    To edit one, give it new data; writing into the old would change the original.
    """
    own: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, own)


def planted(base: LoadedModel, model: PreTrainedModel, truth: Truth) -> Planted:
    """Return an edited copy as the sibling of its base, with what was planted."""
    identity = f"{base.fingerprint}+{replace(truth, directions=None)}"
    return replace(base, role="tuned", model=model, fingerprint=identity), truth


def check_strength(strength: float) -> None:
    """Refuse a strength that is not positive and finite."""
    if not 0 < strength < float("inf"):
        raise PairError(f"strength is {strength}; allowed: above 0 and finite (key: strength)")
