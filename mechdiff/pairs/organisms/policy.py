"""Behaviours written into the residual: a policy at one block, or one that a later block reads.

1. `plant_policy` makes a block write one direction per topic: the MLP's last matrix gets r more terms,
   direction times detector. A detector is the ridge solution that reads 1 at the last token of its topic's
   messages and 0 at all others, so at that block tuned minus base lies in the span of the directions, at
   every token. On messages that it was not given it reads nearly so: more neutral ones make it sharper.
   Directions of one length differ in what they do by an order of magnitude, and one that does a tenth of what
   the others do is not among those that carry nine tenths of the difference. With ``even`` their lengths are
   set so that every topic moves the next token equally far: of r directions, k < r then reach k/r.
2. `plant_relay` makes a block write one direction, and a later one act on it: the first matrices of its MLP
   read the direction. Neither block does much without the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mechdiff.config import SEED
from mechdiff.errors import PairError
from mechdiff.functional.metrics import kl_divergence
from mechdiff.functional.stats import generator
from mechdiff.interventions.grafts import component_modules
from mechdiff.interventions.hooks import record, stop_after
from mechdiff.interventions.sites import Site, check_layers
from mechdiff.pairs.alignment import encode
from mechdiff.pairs.loading import LoadedModel
from mechdiff.pairs.organisms.planted import Planted, Truth, check_strength, copy_model, planted

RIDGE = 1e-5
"""Penalty of a detector, relative to the mean squared length of an input."""
OTHER_TOKENS = 0.03
"""Weight in that fit of a token that is not the last: a narrow MLP cannot tell all of them apart."""
EVENING = 3
"""Times that lengths are corrected: nats grow with the square of a small length, slower with a large one."""
EVENED_ON = 12
"""Messages of each topic on which they are, the first ones."""
MOST = 4.0
"""Largest factor of one correction."""


def plant_policy(
    base: LoadedModel,
    layer: int,
    topics: Sequence[Sequence[str]],
    strength: float = 1.0,
    neutral: Sequence[str] = (),
    seed: int = SEED,
    even: bool = False,
) -> Planted:
    """Make one block write a direction of its own for each topic.

    Args:
        base: The model to copy.
        layer: The block.
        topics: User messages of each topic; their number is the rank.
        strength: Length of what is written at the last token of a message on a topic, over the median norm of
            the residual there; root mean square over topics.
        neutral: Messages on which nothing should be written.
        seed: Seed of the directions.
        even: Give topics that move the next token little a longer direction, instead of one of the same
            length.

    Raises:
        PairError: If there is no topic or no message, more topics than dimensions, the strength is not
            positive, or the block's MLP does not end in a linear map to the residual.
        SiteError: If the layer does not exist.
    """
    check_layers([Site(layer)], base.depth, key="layer")
    check_strength(strength)
    if not 1 <= len(topics) <= base.width or not all(topics):
        raise PairError(
            f"topics has {len(topics)} lists; allowed: 1 to {base.width}, none empty (key: topics)"
        )
    draws = torch.randn(
        base.width, len(topics), generator=generator(seed, "policy", layer), dtype=torch.float64
    )
    directions = torch.linalg.qr(draws).Q
    model = copy_model(base.model)
    name = _write(base, model, layer, topics, neutral, strength, directions, even)
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
    return planted(base, model, truth)


def plant_relay(
    base: LoadedModel,
    write: int,
    read: int,
    messages: Sequence[str],
    strength: float = 1.0,
    neutral: Sequence[str] = (),
    carrier: float = 0.1,
    seed: int = SEED,
) -> Planted:
    """Make one block write a direction on some messages, and a later block act where it finds it.

    The later block's detector tells the same messages with the direction from those without, so that it reads
    what the first one wrote, not what the messages are about.

    Args:
        base: The model to copy.
        write: The block that writes.
        read: The block that reads, above it.
        messages: User messages on which something is written.
        strength: Length of what reading adds at the last token of a message, over the median norm of the
            residual there: of gated MLPs on average, of others to first order.
        neutral: Messages on which nothing should be written.
        carrier: The same of what is written.
        seed: Seed of the direction and of what reading does.

    Raises:
        PairError: If the blocks are not in this order, there is no message, a strength is not positive, or
            the MLPs are not maps from and to the residual.
        SiteError: If a layer does not exist.
    """
    check_layers([Site(layer) for layer in (write, read)], base.depth, key="layer")
    check_strength(strength)
    check_strength(carrier)
    if write >= read or not messages:
        raise PairError(
            f"blocks {write} and {read}, {len(messages)} messages; allowed: the first block below the "
            "second, and 1 message or more (keys: write, read, messages)"
        )
    model = copy_model(base.model)
    draws = generator(seed, "relay", write, read)
    directions = torch.linalg.qr(torch.randn(base.width, 1, generator=draws, dtype=torch.float64)).Q
    written = _write(base, model, write, [messages], neutral, carrier, directions)
    name, first = _map(model, read, base.width, reads=True)
    texts = [*messages, *neutral]
    without = _inputs(base, base.model, read, name, texts)
    with_it = _inputs(base, model, read, name, texts)
    rows = with_it.last[: len(messages)]
    wanted = torch.zeros(len(with_it.states) + len(without.states), 1, dtype=torch.float64)
    wanted[rows] = 1
    both = torch.cat([with_it.states, without.states])
    last = [*with_it.last, *(len(with_it.states) + row for row in without.last)]
    hidden = first.weight.shape[1 if isinstance(first, Conv1D) else 0]
    response = torch.randn(hidden, 1, generator=draws, dtype=torch.float64)
    delta = response @ _detectors(both, last, wanted).T  # (hidden, d_model)
    _add(first, delta)
    moved = (_inputs(base, model, read, name, messages).residuals - with_it.residuals[: len(messages)]).norm(
        dim=-1
    )
    gain = strength * with_it.residuals[: len(messages)].norm(dim=-1).median() / moved.median()
    _add(first, (gain - 1) * delta)
    truth = Truth(
        "relay",
        seed,
        strength,
        (f"mlp.{write}", f"mlp.{read}"),
        (write, read),
        1,
        directions.T.float(),
        tensors=(f"{written}.weight", f"{name}.weight"),
    )
    return planted(base, model, truth)


def _write(
    base: LoadedModel,
    model: PreTrainedModel,
    layer: int,
    topics: Sequence[Sequence[str]],
    neutral: Sequence[str],
    strength: float,
    directions: Tensor,
    even: bool = False,
) -> str:
    """Make a block write one of some directions, `(d_model, topics)`, per topic; return the edited map."""
    name, last = _map(model, layer, base.width)
    texts = [(topic, text) for topic, group in enumerate([*topics, neutral]) for text in group]
    seen = _inputs(base, model, layer, name, [text for _, text in texts])
    wanted = torch.zeros(len(seen.states), len(topics), dtype=torch.float64)
    for row, (topic, _) in zip(seen.last, texts, strict=True):
        wanted[row] = torch.arange(len(topics)) == topic
    detectors = _detectors(seen.states, seen.last, wanted)
    written = strength * seen.residuals.norm(dim=-1).median() * directions
    _add(last, written @ detectors.T)
    if even and len(topics) > 1:
        few = [group[:EVENED_ON] for group in topics]
        clean = [_next_tokens(base, base.model, group) for group in few]
        for _ in range(EVENING):
            moved = torch.stack(
                [
                    kl_divergence(before, _next_tokens(base, model, group)).mean()
                    for before, group in zip(clean, few, strict=True)
                ]
            )
            evened = written * (moved.mean() / moved).sqrt().clamp(1 / MOST, MOST)
            evened *= written.norm() / evened.norm()
            _add(last, (evened - written) @ detectors.T)
            written = evened
    return name


@torch.no_grad()
def _next_tokens(base: LoadedModel, model: PreTrainedModel, texts: Sequence[str]) -> Tensor:
    """Return log-probabilities of the token after each message, `(messages, vocabulary)`, on the CPU."""
    rows = []
    for text in texts:
        ids = torch.tensor([encode(base.tokenizer, text).input_ids], device=model.device)
        rows.append(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1])
    return torch.stack(rows).double().cpu().log_softmax(-1)


def _detectors(inputs: Tensor, last: Sequence[int], wanted: Tensor) -> Tensor:
    """Solve for what reads the wanted numbers off inputs, the last tokens foremost, `(d_inner, numbers)`."""
    weights = torch.full((len(inputs), 1), OTHER_TOKENS, dtype=torch.float64)
    weights[last] = 1.0
    rows = weights * inputs
    level = RIDGE * rows[last].square().sum(1).mean().item()
    if len(rows) <= rows.shape[1]:
        gram = rows @ rows.T
        gram.diagonal().add_(level)
        return rows.T @ torch.linalg.solve(gram, wanted)
    gram = rows.T @ rows
    gram.diagonal().add_(level)
    return torch.linalg.solve(gram, rows.T @ wanted)


def _add(module: nn.Linear | Conv1D, delta: Tensor) -> None:
    """Add `(out, in)` to a map, whose weight gets storage of its own."""
    weight = module.weight
    change = (delta.T if isinstance(module, Conv1D) else delta).to(weight.device)
    weight.data = (weight.double() + change).to(weight.dtype)


class _Reader(nn.Module):
    """Stand for a module in a copy and keep its last input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen = torch.empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return self.module(hidden)


def _map(
    model: PreTrainedModel, layer: int, width: int, reads: bool = False
) -> tuple[str, nn.Linear | Conv1D]:
    """Find the MLP's linear map to the residual, or the last one from it, with its name in the model."""
    (mlp,) = component_modules(model, f"mlp.{layer}")
    maps = [m for m in mlp.modules() if isinstance(m, nn.Linear | Conv1D)]
    fitting = [m for m in maps if m.weight.shape[(0 if reads else 1) ^ (not isinstance(m, Conv1D))] == width]
    found = fitting[-1:] if reads else [m for m in maps[-1:] if m in fitting]
    if not found:
        side = "begin" if reads else "end"
        raise PairError(
            f"{type(mlp).__name__} does not {side} in a linear map to {width} dimensions (key: pair.base.id)"
        )
    return next(name for name, module in model.named_modules() if module is found[0]), found[0]


class _Seen(NamedTuple):
    """What a module reads of some messages, in float64 on the CPU.

    Attributes:
        states: Its inputs at every token but the first, `(tokens, d)`.
        last: Rows of the messages' last tokens.
        residuals: The block's outputs there, `(messages, d_model)`.
    """

    states: Tensor
    last: list[int]
    residuals: Tensor


@torch.no_grad()
def _inputs(base: LoadedModel, model: PreTrainedModel, layer: int, name: str, texts: Sequence[str]) -> _Seen:
    """Run a model on messages up to a block, and keep what a module of that block reads."""
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
    return _Seen(torch.stack(inputs), last, torch.stack(residuals))
