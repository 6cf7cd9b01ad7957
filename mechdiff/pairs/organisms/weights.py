"""Changes of weights alone: noise, heads, and none that matters.

1. `plant_weights` adds Gaussian noise, of full rank or of rank r, to the matrices of chosen components: one
   block, or many for a distributed change of the same total size.
2. `plant_heads` turns what chosen heads write (columns of the output projection negated or rotated) or where
   they look (rows of the query or key projection mixed with noise).
3. `plant_null` changes nothing that matters: a bitwise copy, or weights rounded to bfloat16 and back.
4. `with_rounding` rounds all that a planted difference left alone, as where a sibling was saved in half
   precision: every weight differs, and only the planted one for a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mechdiff.config import SEED
from mechdiff.errors import PairError
from mechdiff.functional.stats import generator
from mechdiff.interventions.grafts import component_tensors
from mechdiff.interventions.head_grafts import group, key_heads, projections
from mechdiff.interventions.hooks import head_weights, num_heads
from mechdiff.interventions.rounding import HALF, rounded_weights
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.pairs.loading import LoadedModel
from mechdiff.pairs.organisms.planted import Planted, Truth, check_strength, copy_model, planted

Mode = Literal["flip", "rotate", "query", "key"]


def plant_weights(
    base: LoadedModel, components: Sequence[str], strength: float, rank: int | None = None, seed: int = SEED
) -> Planted:
    """Add noise to every matrix of some components.

    Args:
        base: The model to copy.
        components: Such as ``["block.12"]`` or ``["mlp.3", "mlp.4"]``.
        strength: Norm of all changes together over the norm of the changed matrices of the FIRST component,
            so that a change spread over many components has the total size of a change of one.
        rank: Rank of each change; None for full rank.
        seed: Seed of the noise.

    Raises:
        PairError: If a component does not exist, or strength or rank is out of range.
    """
    if not components:
        raise PairError("components is empty; allowed: at least one, such as block.0 (key: components)")
    check_strength(strength)
    model = copy_model(base.model)
    tensors = {
        component: {n: t for n, t in component_tensors(model, component).items() if t.ndim == 2}
        for component in components
    }
    matrices = {name: tensor for group in tensors.values() for name, tensor in group.items()}
    limit = min((min(t.shape) for t in matrices.values()), default=0)
    if rank is not None and not 1 <= rank <= limit:
        raise PairError(f"rank is {rank}; allowed: 1 to {limit} (key: rank)")
    size = _total_norm(tensors[components[0]].values())
    noise = {
        name: _noise(tensor, rank, generator(seed, "weights", name)) for name, tensor in matrices.items()
    }
    # Each matrix changes in proportion to its own size.
    relative = {
        name: noise[name] * (matrices[name].double().norm().cpu() / noise[name].norm()) for name in matrices
    }
    scale = strength * size / _total_norm(relative.values())
    for name, tensor in matrices.items():
        tensor.data = (tensor.double() + (scale * relative[name]).to(tensor.device)).to(tensor.dtype)
    layers = tuple(sorted({int(c.partition(".")[2]) for c in components if "." in c}))
    truth = Truth("weights", seed, strength, tuple(components), layers, rank, tensors=tuple(matrices))
    return planted(base, model, truth)


def plant_heads(
    base: LoadedModel,
    heads: Sequence[tuple[int, int]],
    mode: Mode = "flip",
    strength: float = 1.0,
    seed: int = SEED,
) -> Planted:
    """Change what chosen heads write, or where they look.

    Args:
        base: The model to copy.
        heads: Pairs of layer and query head.
        mode: ``flip`` turns the sign of a head's part of the output projection, ``rotate`` rotates the head's
            input to it at random; ``query`` and ``key`` put noise of the same size in the place of the head's
            rows of that projection. Heads that share keys all change with ``key``, and are all in the truth.
        strength: How far to go, from 0 (exclusive) to 1, along the straight line from the old weights to the
            new.
        seed: Seed of rotations and noise.

    Raises:
        PairError: If a head does not exist, is named twice, or none is, mode or strength is out of range, or
            the model has no separate projections of queries and keys.
        SiteError: If a layer does not exist.
    """
    check_layers([Site(layer) for layer, _ in heads], base.depth, key="heads")
    if not heads or len(set(heads)) < len(heads) or not all(0 <= h < base.num_heads for _, h in heads):
        raise PairError(
            f"heads is {list(heads)}; allowed: distinct (layer, 0 to {base.num_heads - 1}) (key: heads)"
        )
    if mode not in get_args(Mode):
        raise PairError(f"mode is {mode!r}; allowed: {', '.join(get_args(Mode))} (key: mode)")
    if not 0 < strength <= 1:
        raise PairError(f"strength is {strength}; allowed: above 0, up to 1 (key: strength)")
    model = copy_model(base.model)
    changed = set(heads)
    if mode == "key":
        changed = {(layer, other) for layer, head in heads for other in group(model, head)}
    names: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    for layer, head in sorted(heads):
        part = _part(model, layer, head, mode)
        if (layer, part.place) in seen:  # keys that another of the heads shares
            continue
        seen.add((layer, part.place))
        name, weight = next(
            (n, p) for n, p in component_tensors(model, f"attn.{layer}").items() if p is part.weight
        )
        if name not in names:
            names[name] = layer
            weight.data = weight.data.clone()  # from here on the copy's own
        view = _part(model, layer, head, mode).rows
        old = view.double()
        draws = generator(seed, "heads", layer, head)
        if mode == "flip":
            new = -old
        elif mode == "rotate":
            turn = torch.randn(len(old), len(old), generator=draws, dtype=torch.float64)
            new = torch.linalg.qr(turn).Q.to(old) @ old
        else:
            noise = torch.randn(old.shape, generator=draws, dtype=torch.float64).to(old)
            new = noise * (old.norm() / noise.norm())
        view.copy_(old + strength * (new - old))
    layers = tuple(sorted(set(names.values())))
    truth = Truth(
        "heads",
        seed,
        strength,
        tuple(f"attn.{i}" for i in layers),
        layers,
        heads=tuple(sorted(changed)),
        tensors=tuple(names),
    )
    return planted(base, model, truth)


def plant_null(base: LoadedModel, kind: Literal["copy", "bf16"] = "copy") -> Planted:
    """Change nothing that matters: a copy, bit for bit, or every weight rounded to bfloat16 and back.

    Raises:
        PairError: If the kind is unknown, or rounding would do nothing because the model is in half
            precision.
    """
    if kind not in ("copy", "bf16"):
        raise PairError(f"kind is {kind!r}; allowed: copy, bf16 (key: kind)")
    model = copy_model(base.model)
    edited = _round(model) if kind == "bf16" else []
    return planted(base, model, Truth(f"null_{kind}", 0, 0.0, tensors=tuple(edited)))


def with_rounding(planted_: Planted) -> Planted:
    """Round to bfloat16 every weight that a planted difference left alone.

    Args:
        planted_: A sibling in single or double precision, and what was planted in it.

    Returns:
        The sibling, and the truth as it was: rounding is no part of it.

    Raises:
        PairError: If the model is in half precision, which rounding would not change.
    """
    sibling, truth = planted_
    model = copy_model(sibling.model)
    rounded = _round(model, truth.tensors)
    return replace(sibling, model=model, fingerprint=f"{sibling.fingerprint}+{len(rounded)} rounded"), truth


class _Part(NamedTuple):
    """What a head has of a projection: the whole weight, the number of the part, and a view of it."""

    weight: Tensor
    place: int
    rows: Tensor


def _part(model: PreTrainedModel, layer: int, head: int, mode: Mode) -> _Part:
    if mode in ("flip", "rotate"):
        view = head_weights(model, layer)  # (heads, width, d_model), of the model's own weight
        assert view._base is not None
        return _Part(view._base, head, view[head])
    weight = projections(model, layer)["q_proj" if mode == "query" else "k_proj"].weight
    assert isinstance(weight, Tensor)
    heads = num_heads(model)
    count = heads if mode == "query" else key_heads(model)
    index = head // (heads // count)
    width = len(weight) // count
    return _Part(weight, index, weight.data[index * width : (index + 1) * width])


def _round(model: PreTrainedModel, keep: Sequence[str] = ()) -> list[str]:
    """Round weights to bfloat16 and back; return the names of those that this changed."""
    if model.dtype in HALF:
        raise PairError(f"dtype is {model.dtype}; allowed: float32, float64 (key: pair.dtype)")
    new = rounded_weights(model, keep)
    for name, weight in model.named_parameters():
        if name in new:
            weight.data = new[name]
    return list(new)


def _total_norm(tensors: Iterable[Tensor]) -> float:
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


def _noise(weight: Tensor, rank: int | None, draws: torch.Generator) -> Tensor:
    rows, columns = weight.shape
    if rank is None:
        return torch.randn(rows, columns, generator=draws, dtype=torch.float64)
    left = torch.randn(rows, rank, generator=draws, dtype=torch.float64)
    return left @ torch.randn(rank, columns, generator=draws, dtype=torch.float64)
