"""Put one model's weights of one component into another of the same architecture.

1. A component is `block.L`, its parts `attn.L` and `mlp.L` (the norms before and after them belong to the
   block alone), `embed`, `norm` (the last one), `head` (the unembedding), or `all`. Embedding and unembedding
   that are one tensor are one component, `embed`.
2. A graft swaps tensors by reference within a context and puts the recipient's own back whatever happens.
   Nothing is copied, so nothing may write to the weights of either model meanwhile.
3. With different vocabularies only the rows of shared tokens are grafted, into a copy of the recipient's
   table, and the other rows stay the recipient's own: of embedding and head the graft is then partial.
4. There are no states, hence nothing is off-distribution and nothing is to be aligned: what a graft does is
   due to these weights in the recipient's context.
5. Interpolation runs a model at theta_base + lambda (theta_tuned - theta_base), bitwise either model at 0 and
   1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechdiff.errors import PairError, UsageError
from mechdiff.interventions.hooks import _ATTENTION, _MLP, _part, blocks_path, get_blocks
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.interventions.suffix import TOLERANCE

Rows = tuple[Tensor, Tensor]
"""Ids of the shared tokens, `(size,)`, in the vocabularies of two models."""

_INSIDE = ("block", "attn", "mlp")
_PROBE_TOKENS = 8


def components(model: PreTrainedModel) -> list[str]:
    """List the components of a model from the embedding up, and `all`.

    Raises:
        PairError: If the final norm or the unembedding cannot be told.
    """
    inside = [f"{kind}.{layer}" for layer in range(len(get_blocks(model))) for kind in _INSIDE]
    ends = ["norm"] if is_tied(model) else ["norm", "head"]
    for end in ends:
        component_modules(model, end)
    return ["embed", *inside, *ends, "all"]


def component_tensors(model: PreTrainedModel, component: str) -> dict[str, Tensor]:
    """Return the parameters and saved buffers of a component by their names in the model.

    Args:
        model: A decoder-only transformers model, adapters merged.
        component: One of `components(model)`.

    Raises:
        PairError: If the model has no such component.
        SiteError: If it has no such layer.
    """
    wanted = {id(t) for part in component_modules(model, component) for t in _state(part).values()}
    return {name: tensor for name, tensor in _state(model).items() if id(tensor) in wanted}


def component_modules(model: PreTrainedModel, component: str) -> list[nn.Module]:
    """Find the modules of a component; arguments and errors as in `component_tensors`."""
    kind, _, number = component.partition(".")
    if kind in _INSIDE and number.isdecimal():
        blocks, layer = get_blocks(model), int(number)
        check_layers([Site(layer)], len(blocks), key="component")
        if kind == "block":
            return [blocks[layer]]
        return [_part(blocks[layer], *((_ATTENTION, "attention") if kind == "attn" else (_MLP, "mlp")))]
    if component == "all":
        return [model]
    ends = _ends(model)
    if component not in ends:
        allowed = f"{', '.join(f'{kind}.<layer>' for kind in _INSIDE)}, {', '.join(ends)}, all"
        raise PairError(
            f"component {component!r} is unknown to this model; allowed: {allowed} (key: component)"
        )
    if component == "norm" and len(ends["norm"]) != 1:
        names = ", ".join(type(part).__name__ for part in ends["norm"]) or "nothing"
        raise PairError(
            f"cannot tell which is the final norm of {type(model).__name__}: found {names} (key: pair)"
        )
    return ends[component]


def is_tied(model: PreTrainedModel) -> bool:
    """Tell whether the unembedding is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is getattr(model.get_input_embeddings(), "weight", None)


def comparable(
    recipient: PreTrainedModel, donor: PreTrainedModel, component: str = "all", rows: Rows | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what recipient and donor have in the same place, by name; of vocabulary tables the shared rows.

    Args:
        recipient: The model that will run.
        donor: The model whose weights are borrowed.
        component: One of `components(recipient)`.
        rows: Shared ids in recipient and donor; None when their vocabularies are the same.

    Raises:
        PairError: If the two do not have the same tensors.
    """
    tables = _tables(recipient)
    found = {}
    for name, (own, other) in _matched(recipient, donor, component, rows).items():
        if rows is not None and id(own) in tables:
            own, other = (t.detach()[ids.to(t.device)] for t, ids in zip((own, other), rows, strict=True))
        found[name] = (own.detach(), other.detach().to(own))
    return found


def changed(
    recipient: PreTrainedModel, donor: PreTrainedModel, component: str, rows: Rows | None = None
) -> frozenset[str]:
    """Name the tensors of a component that a graft would change; arguments as in `comparable`.

    Components with the same names here are the same graft; without any the recipient stays as it is.
    """
    pairs = comparable(recipient, donor, component, rows)
    return frozenset(name for name, (own, other) in pairs.items() if not torch.equal(own, other))


@contextmanager
def graft(
    recipient: PreTrainedModel, donor: PreTrainedModel, component: str, rows: Rows | None = None
) -> Iterator[None]:
    """Run the recipient with the donor's weights of one component within the context.

    Args:
        recipient: The model that runs; frozen.
        donor: The model whose weights are borrowed; frozen, of the same architecture (see
            `check_same_architecture`).
        component: One of `components(recipient)`.
        rows: Shared ids in recipient and donor; None when their vocabularies are the same.

    Raises:
        PairError: If the two do not have the same tensors there.
        SiteError: If the layer does not exist.
    """
    with swapped(_replacements(recipient, donor, component, rows)):
        yield


@contextmanager
def graft_shuffled(
    recipient: PreTrainedModel,
    donor: PreTrainedModel,
    component: str,
    generator: torch.Generator,
    rows: Rows | None = None,
) -> Iterator[None]:
    """Run the recipient with what a graft would add to each tensor, put into drawn places of that tensor.

    It is as large as the graft and means nothing: what it does is what any change of that size does.

    Args:
        recipient: As in `graft`, as the other arguments and errors.
        donor: The model whose weights are borrowed.
        component: One of `components(recipient)`.
        generator: Source of the places, on the CPU.
        rows: Shared ids in recipient and donor.
    """
    drawn = []
    for own, new in _replacements(recipient, donor, component, rows):
        if not torch.equal(own, new):
            change = (new - own.detach()).flatten()
            order = torch.randperm(len(change), generator=generator).to(change.device)
            drawn.append((own, own.detach() + change[order].view_as(own)))
    with swapped(drawn):
        yield


@contextmanager
def interpolate(
    base: PreTrainedModel, tuned: PreTrainedModel, lambda_: float, rows: Rows | None = None
) -> Iterator[PreTrainedModel]:
    """Run the tuned model at `theta_base + lambda_ * (theta_tuned - theta_base)` within the context.

    Only tensors that differ are copied. Embedding rows of tokens that base lacks stay tuned's own at every
    `lambda_`.

    Args:
        base: Where the line is at 0.
        tuned: Where it is at 1; it runs, with its own tokens.
        lambda_: Any finite number; beyond 0 to 1 the line is continued.
        rows: Shared ids in base and tuned; None when their vocabularies are the same.

    Yields:
        The tuned model, its own again afterwards.

    Raises:
        UsageError: If `lambda_` is not finite.
        PairError: If the two are not of one architecture.
    """
    if not math.isfinite(lambda_):
        raise UsageError(f"lambda_ is {lambda_}; allowed: any finite number (key: lambdas)")
    between = []
    for own, other in _replacements(tuned, base, "all", None if rows is None else rows[::-1]):
        if not torch.equal(own, other):
            precise = torch.promote_types(own.dtype, torch.float32)  # half precision would round the step
            between.append((own, torch.lerp(other.to(precise), own.detach().to(precise), lambda_).to(own)))
    with swapped(between):
        yield tuned


@torch.no_grad()
def check_same_architecture(
    recipient: PreTrainedModel, donor: PreTrainedModel, rows: Rows | None = None
) -> None:
    """Refuse two models that the same weights do not make one function.

    Classes, names and shapes are compared; then the recipient runs a few tokens with all of the donor's
    weights, which must give the donor's logits. Without `rows` the tokens are assumed to be the same; with
    them, logits are compared on shared tokens.

    Raises:
        PairError: If they are not; it names what differs.
    """
    kinds = [type(model).__name__ for model in (recipient, donor)]
    if kinds[0] != kinds[1]:
        raise PairError(f"a graft needs one architecture; found {kinds[0]} and {kinds[1]} (key: pair)")
    table = recipient.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    size = len(table if rows is None else rows[0])
    picked = torch.arange(0, size, max(1, size // _PROBE_TOKENS))[:_PROBE_TOKENS]
    ids = [picked if rows is None else side[picked.to(side.device)] for side in rows or (picked, picked)]
    with graft(recipient, donor, "all", rows):
        got = recipient(input_ids=ids[0][None].to(recipient.device), use_cache=False).logits
    wanted = donor(input_ids=ids[1][None].to(donor.device), use_cache=False).logits.to(got)
    if rows is not None:
        got, wanted = (x[..., side.to(x.device)] for x, side in zip((got, wanted), rows, strict=True))
    error, largest = (got - wanted).abs().max().item(), wanted.abs().max().item()
    if not error <= TOLERANCE[got.dtype] * largest:
        ours, theirs = (model.config.get_text_config(decoder=True).to_dict() for model in (recipient, donor))
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise PairError(
            f"with all weights of the donor a logit of the recipient is off by {error:.2g}; allowed: 0; "
            f"differing keys of config.json: {', '.join(keys) or 'none'} (key: pair)"
        )


def _ends(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """Sort the modules outside the blocks; an unembedding that is the embedding goes with it."""
    inside = f"{blocks_path(model)}."
    head, tied = model.get_output_embeddings(), is_tied(model)
    ends: dict[str, list[nn.Module]] = {kind: [] for kind in ("embed", "norm", "head")[: 2 if tied else 3]}
    for name, module in model.named_modules():
        if name.startswith(inside) or not any(True for _ in module.parameters(recurse=False)):
            continue
        if module is head:
            ends["embed" if tied else "head"].append(module)
        else:
            ends["embed" if isinstance(module, nn.Embedding) else "norm"].append(module)
    return ends


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict(keep_vars=True))


def _tables(model: PreTrainedModel) -> set[int]:
    """Identify the tensors that have one row per token."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(tensor) for end in ends if end is not None for tensor in _state(end).values()}


def _matched(
    recipient: PreTrainedModel, donor: PreTrainedModel, component: str, rows: Rows | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair the tensors of two models by name, one entry for a tensor with two names."""
    own, other = component_tensors(recipient, component), component_tensors(donor, component)
    if is_tied(recipient) != is_tied(donor):
        raise PairError(
            "one model has an unembedding of its own, the other has not; allowed: both or neither (key: pair)"
        )
    if missing := sorted(own.keys() ^ other.keys()):
        raise PairError(
            f"{component}: {missing[0]} is in one model only; allowed: equal architectures (key: pair)"
        )
    tables = _tables(recipient)
    found: dict[int, tuple[str, Tensor, Tensor]] = {}
    for name, tensor in own.items():
        shapes = [tuple(tensor.shape), tuple(other[name].shape)]
        if id(tensor) in tables and shapes[0][1:] == shapes[1][1:]:
            if shapes[0] != shapes[1] and rows is None:
                raise PairError(
                    f"{name} has {shapes[0][0]} and {shapes[1][0]} rows; allowed: equal numbers, or the "
                    "ids of the shared tokens (key: pair)"
                )
        elif shapes[0] != shapes[1]:
            raise PairError(f"{name} is {shapes[0]} and {shapes[1]}; allowed: equal shapes (key: pair)")
        found.setdefault(id(tensor), (name, tensor, other[name]))
    return {name: (tensor, new) for name, tensor, new in found.values()}


def _replacements(
    recipient: PreTrainedModel, donor: PreTrainedModel, component: str, rows: Rows | None
) -> list[tuple[Tensor, Tensor]]:
    """Pair the recipient's tensors with what a graft puts into them."""
    tables = _tables(recipient)
    pairs = []
    for own, other in _matched(recipient, donor, component, rows).values():
        new = other.detach().to(own)
        if rows is not None and id(own) in tables:
            to, source = (ids.to(own.device) for ids in rows)
            new = own.detach().index_copy(0, to, new[source])
        pairs.append((own, new))
    return pairs


@contextmanager
def swapped(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Exchange the data of tensors within the context; each pair is a tensor and its new data."""
    kept = [(tensor, tensor.data) for tensor, _ in pairs]
    try:
        for tensor, new in pairs:
            tensor.data = new
        yield
    finally:
        for tensor, old in kept:
            tensor.data = old
