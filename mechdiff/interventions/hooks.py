"""Read and edit activations of a running model; no other file registers a hook.

1. An edit is a pure function of an activation and of the absolute positions of its tokens; it returns a
   tensor of the same shape and dtype.
2. All contexts open on a block share one `_Tap`: one hook per component, which runs every edit in the order
   in which the contexts were opened, then every recorder. What is recorded is therefore the value AFTER the
   edits at that site, whichever context was opened first.
3. A block returns a tensor and an attention module a tuple; only the activation itself is exchanged.
4. `head_out` is z_h W_O,h with the model's own output projection. It is no tensor of the forward pass: an
   edit there changes the output of the projection by the sum over heads of (edited - original). A bias of
   the projection belongs to no head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from mechdiff.errors import SiteError, UsageError
from mechdiff.interventions.sites import Site, check_layers

Edit = Callable[[Tensor, Tensor], Tensor]

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_EDIT, _RECORD, _STOP = range(3)  # the order in which actions at one site run


class _Stopped(Exception):
    """Leave a forward pass early; `stop_after` catches it."""


def blocks_path(model: nn.Module) -> str:
    """Find the dotted name of the list of decoder blocks.

    It is the shallowest `ModuleList` with as many entries as the configuration has hidden layers.

    Raises:
        UsageError: If there is no such list, or more than one.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{name} is not a decoder-only transformers model (key: pair)")
    count = config.get_text_config(decoder=True).num_hidden_layers
    level, shallowest = {"": model}, list[str]()
    while level and not shallowest:  # level by level: what lies within the blocks is not looked at
        level = {
            f"{path}.{child}" if path else child: module
            for path, parent in level.items()
            for child, module in parent.named_children()
        }
        lists = {path: module for path, module in level.items() if isinstance(module, nn.ModuleList)}
        shallowest = [path for path, module in lists.items() if len(module) == count]
    if len(shallowest) != 1:
        found = f"found {len(shallowest)} lists of that length"
        raise UsageError(f"cannot tell which are the {count} decoder blocks of {name}: {found} (key: pair)")
    return shallowest[0]


def get_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder blocks, from the embedding up.

    Raises:
        UsageError: If the model's class has no single list of blocks.
    """
    blocks = model.get_submodule(blocks_path(model))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _part(block: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    """Find a part of a block by the name of its module, breadth first."""
    found = [(path.count("."), path) for path, _ in block.named_modules() if path.rsplit(".", 1)[-1] in names]
    if not found:
        raise SiteError(
            f"{type(block).__name__} has no {what} module; known names: {', '.join(names)} (key: layers)"
        )
    return block.get_submodule(min(found)[1])


def _projection(block: nn.Module) -> nn.Module:
    return _part(_part(block, _ATTENTION, "attention"), _OUTPUT, "attention output projection")


def _head_weights(block: nn.Module, heads: int) -> Tensor:
    projection = _projection(block)
    if isinstance(projection, nn.Linear):
        weight = projection.weight.T
    elif isinstance(projection, Conv1D):  # stored as (in, out)
        weight = projection.weight
    else:
        kind = f"{type(projection).__module__}.{type(projection).__name__}"
        raise SiteError(
            f"{kind} is no output projection; allowed: Linear, Conv1D, adapters merged (key: pair)"
        )
    if weight.ndim != 2 or weight.shape[0] % heads:
        raise SiteError(f"a projection of shape {tuple(weight.shape)} is not {heads} heads wide (key: pair)")
    return weight.unflatten(0, (heads, -1))


def head_weights(model: nn.Module, layer: int) -> Tensor:
    """Return the output projection split by query head.

    Returns:
        W_O as `(heads, head_width, d_model)`, a view of the model's own weight.

    Raises:
        SiteError: If the layer does not exist, or its projection is neither `Linear` nor `Conv1D`.
    """
    blocks = get_blocks(model)
    check_layers([Site(layer)], len(blocks))
    return _head_weights(blocks[layer], num_heads(model))


def num_heads(model: nn.Module) -> int:
    """Return the number of query heads of every block."""
    return int(model.config.get_text_config(decoder=True).num_attention_heads)  # type: ignore[union-attr,operator]


def _exchange(output: Any, run: Callable[[Tensor], Tensor]) -> Any:
    """Apply `run` to the activation in a module's output, a tensor or a tuple that starts with it."""
    if isinstance(output, Tensor):
        return run(output)
    return (run(output[0]), *output[1:])


class _Tap:
    """The edits and recorders attached to one block, and the hooks that serve them."""

    def __init__(self, block: nn.Module, layer: int, heads: int) -> None:
        self.block, self.layer, self.heads = block, layer, heads
        self.actions: dict[str, list[tuple[int, Edit]]] = {}
        self.handles: dict[str, RemovableHandle] = {}
        self.positions: Tensor | None = None

    def add(self, component: str, entry: tuple[int, Edit]) -> None:
        if component not in self.handles:
            self.handles[component] = self._hook(component)
        if "positions" not in self.handles:
            self.handles["positions"] = self.block.register_forward_pre_hook(
                self._note_positions, with_kwargs=True
            )
        entries = self.actions.setdefault(component, [])
        entries.append(entry)
        entries.sort(key=lambda item: item[0])  # stable: edits stay in the order of their contexts

    def remove(self, component: str, entry: tuple[int, Edit]) -> None:
        self.actions[component] = [kept for kept in self.actions[component] if kept is not entry]
        if not self.actions[component]:
            del self.actions[component]
            self.handles.pop(component).remove()
        if not self.actions:
            self.handles.pop("positions").remove()

    def run(self, component: str, value: Tensor) -> Tensor:
        positions = self.positions
        assert positions is not None
        for _, action in self.actions[component]:
            value = action(value, positions)
        return value

    def _hook(self, component: str) -> RemovableHandle:
        if component == "head_z":
            return _projection(self.block).register_forward_pre_hook(self._on_heads)
        if component == "head_out":
            weights = _head_weights(self.block, self.heads)
            return _projection(self.block).register_forward_hook(
                functools.partial(self._on_contributions, weights)
            )
        module = {
            "resid_post": lambda: self.block,
            "attn_out": lambda: _part(self.block, _ATTENTION, "attention"),
            "mlp_out": lambda: _part(self.block, _MLP, "mlp"),
        }[component]()
        return module.register_forward_hook(
            lambda _m, _i, output: _exchange(output, functools.partial(self.run, component))
        )

    def _note_positions(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the absolute index of every token of this forward, `(batch, position)`."""
        hidden = args[0] if args else kwargs["hidden_states"]
        positions = kwargs.get("position_ids")
        if positions is None:  # this architecture does not hand them to its blocks
            caches = [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]
            past = caches[0].get_seq_length(self.layer) if caches else 0
            positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        self.positions = positions.expand(hidden.shape[0], -1)

    def _on_heads(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        heads = args[0].unflatten(-1, (self.heads, -1))
        return (self.run("head_z", heads).flatten(-2), *args[1:])

    def _on_contributions(
        self, weights: Tensor, _module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        heads = torch.einsum("bphw,hwd->bphd", args[0].unflatten(-1, (self.heads, -1)), weights)
        if all(stage != _EDIT for stage, _ in self.actions["head_out"]):
            self.run("head_out", heads)
            return output
        before = heads.clone()  # an edit in place must not hide its own difference
        return output + (self.run("head_out", heads) - before).sum(dim=-2)


_TAPS: dict[nn.Module, _Tap] = {}  # only while a context is open


@contextmanager
def _attached(model: nn.Module, actions: Iterable[tuple[Site, int, Edit]]) -> Iterator[None]:
    """Attach actions to the blocks of a model, and detach them whatever happens."""
    actions = list(actions)
    if not actions:  # finding the blocks costs as much as running one
        yield
        return
    blocks, heads = get_blocks(model), num_heads(model)
    check_layers([site for site, _, _ in actions], len(blocks))
    attached: list[tuple[_Tap, str, tuple[int, Edit]]] = []
    try:
        for site, stage, action in actions:
            block = blocks[site.layer]
            tap = _TAPS.get(block) or _Tap(block, site.layer, heads)
            entry = (stage, action)
            tap.add(site.component, entry)
            _TAPS[block] = tap
            attached.append((tap, site.component, entry))
        yield
    finally:
        for tap, component, entry in reversed(attached):
            tap.remove(component, entry)
            if not tap.actions:
                del _TAPS[tap.block]


def _checked(site: Site, edit: Edit) -> Edit:
    def run(value: Tensor, positions: Tensor) -> Tensor:
        shape, dtype = value.shape, value.dtype
        edited = edit(value, positions)
        if edited.shape != shape or edited.dtype != dtype:
            got = f"{tuple(edited.shape)} {edited.dtype}"
            raise UsageError(
                f"the edit at {site} returned {got}; allowed: {tuple(shape)} {dtype} (key: edits)"
            )
        return edited

    return run


@contextmanager
def intervene(model: nn.Module, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Edit activations in every forward pass within the context.

    Contexts nest: an edit sees what the edits of the contexts around it returned. The positions given to an
    edit are those that the model used, so they stay right with a cache, in chunks, and under left padding
    when the caller passes `position_ids` (otherwise the model itself counts padding as tokens).

    Args:
        model: A decoder-only transformers model.
        edits: For each site, a pure function `(activation, position_ids)` to an activation of the same shape
            and dtype. The activation is `(batch, position, d_model)`, or `(batch, position, heads, width)`
            for head sites; `position_ids` is `(batch, position)`.

    Raises:
        SiteError: If the model has no such site.
        UsageError: If an edit changes shape or dtype.
    """
    with _attached(model, [(site, _EDIT, _checked(site, edit)) for site, edit in edits.items()]):
        yield


@contextmanager
def record(
    model: nn.Module, sites: Iterable[Site], pick: Callable[[Tensor], Tensor] = torch.clone
) -> Iterator[dict[Site, Tensor]]:
    """Keep activations of every forward pass within the context.

    What is kept is the value after all edits at the same site, as a detached copy that no later edit can
    change. Each forward overwrites what the last one left.

    Args:
        model: A decoder-only transformers model.
        sites: Where to read; see `Site` for what each component is.
        pick: What to keep of an activation, as a copy; all of it by default.

    Yields:
        A dictionary, empty until the first forward.

    Raises:
        SiteError: If the model has no such site.
    """
    kept: dict[Site, Tensor] = {}

    def keep(site: Site) -> Edit:
        def run(value: Tensor, _positions: Tensor) -> Tensor:
            kept[site] = pick(value.detach())
            return value

        return run

    with _attached(model, [(site, _RECORD, keep(site)) for site in dict.fromkeys(sites)]):
        yield kept


@contextmanager
def stop_after(model: nn.Module, layer: int) -> Iterator[None]:
    """End every forward pass within the context right after one block.

    Nothing above the block runs and the call `model(...)` returns None; the statements after it run as usual.
    Call the model itself, not one of its parts. Combine with `record` to read what came before.

    Raises:
        SiteError: If the layer does not exist.
    """

    def stop(_value: Tensor, _positions: Tensor) -> Tensor:
        raise _Stopped(f"stopped after block {layer}: call the model given to stop_after, not a part of it")

    complete, own = model.forward, model.__dict__.get("forward")

    @functools.wraps(complete)
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return complete(*args, **kwargs)
        except _Stopped:
            return None

    with _attached(model, [(Site(layer), _STOP, stop)]):
        model.__dict__["forward"] = forward
        try:
            yield
        finally:
            if own is None:
                del model.__dict__["forward"]
            else:
                model.__dict__["forward"] = own


@contextmanager
def cache_layer(model: nn.Module, layer: int) -> Iterator[dict[Site, Tensor]]:
    """Keep the output of one block; `record` for a single `resid_post` site."""
    with record(model, [Site(layer)]) as kept:
        yield kept
