"""Differences planted in the weights of a copy, so that the right answer is known.

1. `plant_weights` adds Gaussian noise, of full rank or of rank r, to the matrices of chosen components: one
   block, or many for a distributed change of the same total size.
2. `plant_policy` makes a block write one direction per topic: the MLP's last matrix gets r more terms,
   direction times detector. A detector is the ridge solution that reads 1 at the last token of its topic's
   messages and 0 at all others, so at that block tuned minus base lies in the span of the directions, at
   every token. On messages that it was not given it reads nearly so: more neutral ones make it sharper.
3. `plant_heads` turns what chosen heads write: the columns of the output projection are negated or rotated.
4. `plant_null` changes nothing that matters: a bitwise copy, or weights rounded to bfloat16 and back.

A copy shares the storage of every tensor that was not edited with its base, and none that was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mechdiff.config import SEED
from mechdiff.errors import PairError
from mechdiff.functional.stats import generator
from mechdiff.interventions.grafts import component_modules, component_tensors
from mechdiff.interventions.hooks import head_weights, record, stop_after
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.pairs.spec import PairSpec

RIDGE = 1e-5
"""Penalty of a detector, relative to the mean squared length of an input."""
OTHER_TOKENS = 0.03
"""Weight in that fit of a token that is not the last: a narrow MLP cannot tell all of them apart."""


@dataclass(frozen=True)
class Truth:
    """What was planted.

    Attributes:
        kind: ``weights``, ``policy``, ``heads``, ``null_copy`` or ``null_bf16``.
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
    _positive(strength)
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
    return _planted(base, model, truth)


def plant_policy(
    base: LoadedModel,
    layer: int,
    topics: Sequence[Sequence[str]],
    strength: float = 1.0,
    neutral: Sequence[str] = (),
    seed: int = SEED,
) -> Planted:
    """Make one block write a direction of its own for each topic.

    Args:
        base: The model to copy.
        layer: The block.
        topics: User messages of each topic; their number is the rank.
        strength: Length of what is written at the last token of a message on a topic, over the median norm of
            the residual there.
        neutral: Messages on which nothing should be written.
        seed: Seed of the directions.

    Raises:
        PairError: If there is no topic or no message, more topics than dimensions, the strength is not
            positive, or the block's MLP does not end in a linear map to the residual.
        SiteError: If the layer does not exist.
    """
    check_layers([Site(layer)], base.depth, key="layer")
    _positive(strength)
    if not 1 <= len(topics) <= base.width or not all(topics):
        raise PairError(
            f"topics has {len(topics)} lists; allowed: 1 to {base.width}, none empty (key: topics)"
        )
    model = copy_model(base.model)
    name, last = _last_map(model, layer, base.width)
    texts = [(topic, text) for topic, group in enumerate([*topics, neutral]) for text in group]
    inputs, last_tokens, residuals = _at_last_map(base, model, layer, name, [text for _, text in texts])
    wanted = torch.zeros(len(inputs), len(topics), dtype=torch.float64)
    for row, (topic, _) in zip(last_tokens, texts, strict=True):
        wanted[row] = torch.arange(len(topics)) == topic
    weights = torch.full((len(inputs), 1), OTHER_TOKENS, dtype=torch.float64)
    weights[last_tokens] = 1.0
    inputs = weights * inputs
    gram = inputs @ inputs.T
    gram.diagonal().add_(RIDGE * gram.diagonal()[last_tokens].mean().item())
    detectors = inputs.T @ torch.linalg.solve(gram, wanted)  # (d_inner, rank)
    draws = torch.randn(
        base.width, len(topics), generator=generator(seed, "policy", layer), dtype=torch.float64
    )
    directions = torch.linalg.qr(draws).Q
    write = strength * residuals.norm(dim=-1).median() * directions @ detectors.T  # (d_model, d_inner)
    weight = last.weight
    delta = (write.T if isinstance(last, Conv1D) else write).to(weight.device)
    weight.data = (weight.double() + delta).to(weight.dtype)
    truth = Truth(
        "policy",
        seed,
        strength,
        (f"mlp.{layer}",),
        (layer,),
        len(topics),
        directions.T.float(),
        tensors=(f"{name}.weight",),
    )
    return _planted(base, model, truth)


def plant_heads(
    base: LoadedModel,
    heads: Sequence[tuple[int, int]],
    mode: Literal["flip", "rotate"] = "flip",
    strength: float = 1.0,
    seed: int = SEED,
) -> Planted:
    """Change what chosen heads write.

    Args:
        base: The model to copy.
        heads: Pairs of layer and query head.
        mode: ``flip`` turns the sign of a head's part of the output projection, ``rotate`` rotates the head's
            input to it at random.
        strength: How far to go, from 0 (exclusive) to 1, along the straight line from the old weights to the
            new.
        seed: Seed of the rotations.

    Raises:
        PairError: If a head does not exist, is named twice, or none is, or mode or strength is out of range.
        SiteError: If a layer does not exist.
    """
    check_layers([Site(layer) for layer, _ in heads], base.depth, key="heads")
    if not heads or len(set(heads)) < len(heads) or not all(0 <= h < base.num_heads for _, h in heads):
        raise PairError(
            f"heads is {list(heads)}; allowed: distinct (layer, 0 to {base.num_heads - 1}) (key: heads)"
        )
    if mode not in ("flip", "rotate"):
        raise PairError(f"mode is {mode!r}; allowed: flip, rotate (key: mode)")
    if not 0 < strength <= 1:
        raise PairError(f"strength is {strength}; allowed: above 0, up to 1 (key: strength)")
    model = copy_model(base.model)
    names = {}
    for layer, head in sorted(heads):
        view = head_weights(model, layer)  # (heads, width, d_model), of the copy's own weight
        name, weight = next(
            (n, p) for n, p in component_tensors(model, f"attn.{layer}").items() if p is view._base
        )
        if name not in names:
            names[name] = layer
            weight.data = weight.data.clone()  # from here on the copy's own
            view = head_weights(model, layer)
        old = view[head].double()
        draws = torch.randn(
            len(old), len(old), generator=generator(seed, "heads", layer, head), dtype=torch.float64
        )
        new = -old if mode == "flip" else torch.linalg.qr(draws).Q.to(old) @ old
        view[head].copy_(old + strength * (new - old))
    layers = tuple(sorted(set(names.values())))
    truth = Truth(
        "heads",
        seed,
        strength,
        tuple(f"attn.{i}" for i in layers),
        layers,
        heads=tuple(sorted(heads)),
        tensors=tuple(names),
    )
    return _planted(base, model, truth)


def plant_null(base: LoadedModel, kind: Literal["copy", "bf16"] = "copy") -> Planted:
    """Change nothing that matters: a copy, bit for bit, or every weight rounded to bfloat16 and back.

    Raises:
        PairError: If the kind is unknown, or rounding would do nothing because the model is in half
            precision.
    """
    if kind not in ("copy", "bf16"):
        raise PairError(f"kind is {kind!r}; allowed: copy, bf16 (key: kind)")
    model = copy_model(base.model)
    edited = []
    if kind == "bf16":
        if base.model.dtype in (torch.bfloat16, torch.float16):
            raise PairError(f"dtype is {base.model.dtype}; allowed: float32, float64 (key: pair.dtype)")
        for name, parameter in model.named_parameters():
            rounded = parameter.data.bfloat16().to(parameter.dtype)
            if not torch.equal(rounded, parameter.data):
                parameter.data = rounded
                edited.append(name)
    return _planted(base, model, Truth(f"null_{kind}", 0, 0.0, tensors=tuple(edited)))


def copy_model(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a frozen model with parameters of its own over the same storage.

    To edit one, give it new data; writing into the old would change the original.
    """
    own: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, own)


def _planted(base: LoadedModel, model: PreTrainedModel, truth: Truth) -> Planted:
    identity = f"{base.fingerprint}+{replace(truth, directions=None)}"
    return replace(base, role="tuned", model=model, fingerprint=identity), truth


def _positive(strength: float) -> None:
    if not 0 < strength < float("inf"):
        raise PairError(f"strength is {strength}; allowed: above 0 and finite (key: strength)")


def _total_norm(tensors: Iterable[Tensor]) -> float:
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


def _noise(weight: Tensor, rank: int | None, draws: torch.Generator) -> Tensor:
    rows, columns = weight.shape
    if rank is None:
        return torch.randn(rows, columns, generator=draws, dtype=torch.float64)
    left = torch.randn(rows, rank, generator=draws, dtype=torch.float64)
    return left @ torch.randn(rank, columns, generator=draws, dtype=torch.float64)


class _Reader(nn.Module):
    """Stand for a module in a copy and keep its last input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen = torch.empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return self.module(hidden)


def _last_map(model: PreTrainedModel, layer: int, width: int) -> tuple[str, nn.Linear | Conv1D]:
    """Find the MLP's linear map to the residual, with its name in the model."""
    (mlp,) = component_modules(model, f"mlp.{layer}")
    maps = [m for m in mlp.modules() if isinstance(m, nn.Linear | Conv1D)]
    if not maps or maps[-1].weight.shape[1 if isinstance(maps[-1], Conv1D) else 0] != width:
        raise PairError(
            f"{type(mlp).__name__} does not end in a linear map to {width} dimensions (key: pair.base.id)"
        )
    return next(name for name, module in model.named_modules() if module is maps[-1]), maps[-1]


@torch.no_grad()
def _at_last_map(
    base: LoadedModel, model: PreTrainedModel, layer: int, name: str, texts: Sequence[str]
) -> tuple[Tensor, list[int], Tensor]:
    """Return inputs of a module at every token but the first, rows of last tokens, and residuals there."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    reader = _Reader(model.get_submodule(name))
    inputs: list[Tensor] = []
    last, residuals = [], []
    holder._modules[child] = reader
    try:
        with record(model, [Site(layer)]) as seen, stop_after(model, layer):
            for text in texts:
                ids = torch.tensor([encode(base.tokenizer, text).input_ids], device=model.device)
                model(input_ids=ids, use_cache=False)
                seen_by_map = reader.seen[0].double().cpu()
                inputs += seen_by_map[min(1, len(seen_by_map) - 1) :].unbind()  # the first differs
                last.append(len(inputs) - 1)
                residuals.append(seen[Site(layer)][0, -1].double().cpu())
    finally:
        holder._modules[child] = reader.module
    return torch.stack(inputs), last, torch.stack(residuals)
