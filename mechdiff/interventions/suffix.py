"""Run only the blocks above an intervention.

1. Every run makes a view of the model: the modules on the path from the model to its blocks are copied
   shallowly, each with its own table of children. No weight is copied and the model stays as it is.
2. The view has as many blocks as the model, because blocks are looked up by index (window or full attention,
   keys and values). Below layer L they pass their input through; block L returns the residual that was
   given; those above are the model's own, as are embedding, masks and positions.
3. With a prefix, its keys and values are kept and only the tokens after it are run. The rows of a batch (arms
   of an experiment) share one prefix: it is expanded without a copy, and never changed, because the
   library's cache concatenates instead of writing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mechdiff.errors import UsageError
from mechdiff.functional.stats import generator
from mechdiff.interventions.attention import attention_path, head_layers
from mechdiff.interventions.hooks import Edit, blocks_path, get_blocks, intervene, record
from mechdiff.interventions.sites import Site, check_layers

# Largest difference that `check` accepts, relative to the largest logit. It is not 0 because products with
# kept keys have other shapes, hence other rounding.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class CleanRun(NamedTuple):
    """The states `{layer: (rows, T, d_model)}` and the logits of one forward; see `SuffixEngine.resume`."""

    states: dict[int, Tensor]
    logits: Tensor


class _Stub(nn.Module):
    """Stand for a block: return the given residual, or the input when there is none."""

    def __init__(self, block: nn.Module, hidden: Tensor | None) -> None:
        super().__init__()
        # Some models choose a mask by a plain attribute of the block.
        self.__dict__.update(
            {name: kept for name, kept in vars(block).items() if isinstance(kept, str | int)}
        )
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states if self.hidden is None else self.hidden


class _Attended(nn.Module):
    """Stand for an attention module whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return self.output, None


def _twin(module: nn.Module) -> nn.Module:
    """Copy a module shallowly with its own table of children (`copy.copy` alone shares that table)."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def _expand(cache: DynamicCache, rows: int) -> DynamicCache:
    """Give a cache `rows` rows without copying keys or values; the given cache stays as it is."""
    expanded = copy.copy(cache)
    expanded.layers = []
    for layer in map(copy.copy, cache.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        if layer.keys.shape[0] not in (1, rows):
            raise UsageError(f"prefix has {layer.keys.shape[0]} rows; allowed: 1 or {rows} (key: prefix)")
        layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
        expanded.layers.append(layer)
    return expanded


def run_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    logits_at: Tensor | None = None,
    prefix: DynamicCache | None = None,
) -> Tensor:
    """Run a whole model, its head at the wanted columns alone; arguments as in `SuffixEngine.resume`."""
    logits: Tensor = run(model, input_ids, attention_mask, logits_at, prefix).logits
    return logits[:, 0] if logits_at is None or logits_at.ndim == 1 else logits


def run(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    logits_at: Tensor | None = None,
    prefix: DynamicCache | None = None,
    keep: bool = False,
) -> Any:
    """Do the same and return all that the model does: None if `stop_after` ended the pass.

    Args:
        model: The model.
        input_ids: `(rows, T)`, padded on the right.
        attention_mask: `(rows, T)`, or None when there is no padding.
        logits_at: Columns to give logits for; None: the last.
        prefix: Keys and values of what comes before.
        keep: Return keys and values also where there is no prefix.

    Raises:
        UsageError: If shapes disagree or padding is not on the right.
    """
    rows = input_ids.shape[0]
    if logits_at is None:
        logits_at = torch.full((rows,), input_ids.shape[1] - 1)
    if logits_at.ndim not in (1, 2) or logits_at.shape[0] != rows:
        shape = tuple(logits_at.shape)
        raise UsageError(f"logits_at is {shape}; allowed: ({rows},) or ({rows}, m) (key: logits_at)")
    if attention_mask is not None and (attention_mask.long().diff(dim=1) > 0).any():
        raise UsageError("attention_mask has a 0 before a 1; allowed: right padding (key: attention_mask)")
    cache = None if prefix is None else _expand(prefix, rows)
    if attention_mask is not None and cache is not None:
        before = attention_mask.new_ones(rows, cache.get_seq_length())
        attention_mask = torch.cat([before, attention_mask], dim=1)
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=keep or cache is not None,
        logits_to_keep=logits_at.reshape(rows, -1).to(input_ids.device),
    )


@torch.no_grad()
def prefill(model: nn.Module, input_ids: Tensor, prefix: DynamicCache | None = None) -> DynamicCache:
    """Compute the keys and values of a prefix in every layer.

    Args:
        model: The model.
        input_ids: `(rows, P)` without padding; one row serves any number of rows in `run_logits`.
        prefix: Those of what comes before, which are not computed again.

    Raises:
        UsageError: If a layer keeps anything but keys and values (recurrent or linear attention).
    """
    cache: DynamicCache = run(model, input_ids, prefix=prefix, keep=True).past_key_values
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            name = type(model).__name__
            raise UsageError(f"{name} keeps a {type(layer).__name__}; allowed: keys and values (key: pair)")
    return cache


class SuffixEngine:
    """Answer "what if the residual after block L were this?" at the cost of the blocks above L.

    Padding is on the right, and positions count from the first token. `resume` is differentiable in `hidden`
    and through edits unless gradients are off; `clean` and `prefill` never keep a graph.
    """

    def __init__(self, model: nn.Module) -> None:
        """Keep the model and `check` that the shortcut is exact for it."""
        self.model = model
        self._path = blocks_path(model)
        self._num_layers = len(get_blocks(model))
        self.check()

    @torch.no_grad()
    def clean(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        layers: Iterable[int],
        *,
        logits_at: Tensor | None = None,
    ) -> CleanRun:
        """Run the whole model once on `(rows, T)` tokens and keep the output of `layers`; see `resume`."""
        sites = [Site(layer) for layer in layers]
        with record(self.model, sites) as kept:
            logits = run_logits(self.model, input_ids, attention_mask, logits_at)
        return CleanRun({site.layer: kept[site] for site in sites}, logits)

    def prefill(self, input_ids: Tensor, prefix: DynamicCache | None = None) -> DynamicCache:
        """Compute the keys and values of a prefix; see the function of that name."""
        return prefill(self.model, input_ids, prefix)

    @torch.no_grad()
    def prefill_from(self, layer: int, hidden: Tensor, input_ids: Tensor, own: DynamicCache) -> DynamicCache:
        """Compute the keys and values of a prefix whose residual after one block is another.

        Args:
            layer: The block whose output is replaced.
            hidden: That output, `(rows, P, d_model)`, from the first token on.
            input_ids: `(rows, P)` without padding.
            own: From `prefill` of the same tokens; what it holds up to `layer` is kept.
        """
        above = prefill(self._view(layer, hidden), input_ids)
        mixed = copy.copy(own)
        mixed.layers = [*own.layers[: layer + 1], *above.layers[layer + 1 :]]
        return mixed

    def resume(
        self,
        layer: int,
        hidden: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prefix: DynamicCache | None = None,
        logits_at: Tensor | None = None,
        edits: Mapping[Site, Edit] | None = None,
    ) -> Tensor:
        """Run the blocks above `layer` on a given residual.

        Args:
            layer: The block whose output is replaced.
            hidden: That output, `(rows, T, d_model)`.
            input_ids: The tokens, `(rows, T)`, padded on the right.
            attention_mask: `(rows, T)`, or None when there is no padding.
            prefix: From `prefill`, with 1 or `rows` rows; the `T` columns are then the tokens after it.
            logits_at: Columns among the `T` to give logits for, `(rows,)` or `(rows, m)`; None: the last.
            edits: Edits above `layer`, or at its `resid_post`, where they act on `hidden`.

        Returns:
            Logits `(rows, vocab)`, or `(rows, m, vocab)` if `logits_at` has two axes.

        Raises:
            SiteError: If the model has no such layer.
            UsageError: If shapes disagree, padding is not on the right, or an edit lies below `hidden`.
        """
        edits = edits or {}
        check_layers([Site(layer), *edits], self._num_layers)
        if hidden.shape[:2] != input_ids.shape:
            wanted = (*input_ids.shape, hidden.shape[-1])
            raise UsageError(f"hidden is {tuple(hidden.shape)}; allowed: {wanted} (key: hidden)")
        for site in edits:
            if site.layer < layer or (site.layer == layer and site != Site(layer)):
                raise UsageError(f"edit at {site} cannot act; allowed: {Site(layer)} and above (key: edits)")
        view = self._view(layer, hidden)
        with intervene(view, edits):
            return run_logits(view, input_ids, attention_mask, logits_at, prefix)

    def resume_attended(
        self,
        layer: int,
        hidden: Tensor | None,
        attention: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prefix: DynamicCache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Run what follows the attention of a block: its MLP and the blocks above.

        Args:
            layer: The block whose attention is replaced.
            hidden: Its input, `(rows, T, d_model)`; None for the first block, which gets the embedding.
            attention: What its attention module is to return, `(rows, T, d_model)`.
            input_ids: See `resume`; so are the others.
            attention_mask: `(rows, T)` or None.
            prefix: Keys and values of the tokens before.
            logits_at: Columns to give logits for.

        Returns:
            Logits, as in `resume`.

        Raises:
            SiteError: If the model has no such layer or the block no attention.
            UsageError: If there is no input for a block that is not the first.
        """
        view = self._view(layer - 1, self._input(layer, hidden))
        blocks = view.get_submodule(self._path)
        node = block = _twin(blocks.get_submodule(str(layer)))
        *parents, name = attention_path(block).split(".")
        for parent in parents:
            child = _twin(node.get_submodule(parent))
            node._modules[parent] = child
            node = child
        node._modules[name] = _Attended(attention)
        blocks._modules[str(layer)] = block
        return run_logits(view, input_ids, attention_mask, logits_at, prefix)

    def run_block(
        self, layer: int, hidden: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Run one block on a given input and none of the others, for what `record` sees meanwhile.

        Args:
            layer: The block.
            hidden: Its input, `(rows, T, d_model)`; None for the first block, which gets the embedding.
            input_ids: The tokens, `(rows, T)`, padded on the right.
            attention_mask: `(rows, T)` or None.
        """
        view = self._view(layer - 1, self._input(layer, hidden))
        blocks = view.get_submodule(self._path)
        for index in range(layer + 1, self._num_layers):
            blocks._modules[str(index)] = _Stub(blocks.get_submodule(str(index)), None)
        run_logits(view, input_ids, attention_mask)

    def _input(self, layer: int, hidden: Tensor | None) -> Tensor | None:
        check_layers([Site(layer)], self._num_layers)
        if hidden is None and layer > 0:
            raise UsageError(f"no input for block {layer}; allowed: none for block 0 alone (key: hidden)")
        return None if layer == 0 else hidden

    @torch.no_grad()
    def check(self) -> None:
        """Compare with the whole model on 8 random tokens, the last 3 with a perturbed residual.

        The first, middle and last block are tried, with and without kept keys and values. The largest error
        of a logit must stay under `TOLERANCE` times the largest logit.

        Raises:
            UsageError: If it does not: this architecture needs full forward passes.
        """
        embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
        draws = generator(0, "suffix")
        ids = torch.randint(0, embedding.shape[0], (2, 8), generator=draws).to(embedding.device)
        columns = torch.arange(8, device=ids.device).expand(2, -1)
        layers = sorted({0, self._num_layers // 2, self._num_layers - 1})
        states, _ = self.clean(ids, None, layers)
        prefix = self.prefill(ids[:, :5])
        for layer in layers:
            noise = torch.randn(states[layer][:, 5:].shape, generator=draws).to(states[layer])
            moved = states[layer].clone()
            moved[:, 5:] += noise * moved[:, 5:].std(dim=-1, keepdim=True)
            with intervene(self.model, {Site(layer): lambda _hidden, _positions, moved=moved: moved}):  # type: ignore[misc]
                truth = run_logits(self.model, ids, logits_at=columns)
            whole = self.resume(layer, moved, ids, logits_at=columns)
            tail = self.resume(layer, moved[:, 5:], ids[:, 5:], prefix=prefix, logits_at=columns[:, :3])
            error = torch.cat([whole - truth, tail - truth[:, 5:]], dim=1).abs().max().item()
            error = max(error, self._error_attended(layer, ids, columns, noise))
            allowed = TOLERANCE[moved.dtype] * truth.abs().max().item()
            if not error <= allowed:
                found = f"{type(self.model).__name__} resumed after block {layer} is off by {error:.2g} logit"
                raise UsageError(f"{found}; allowed: {allowed:.2g} (key: pair)")

    def _error_attended(self, layer: int, ids: Tensor, columns: Tensor, noise: Tensor) -> float:
        """Return the largest error of a logit when the attention of a block is given."""
        site = Site(layer, "attn_out")
        if layer not in head_layers(self.model):
            return 0.0
        below = [Site(layer - 1)] if layer else []
        with record(self.model, [site, *below]) as kept:
            run_logits(self.model, ids)
        given = kept[site].clone()
        given[:, 5:] += noise * given[:, 5:].std(dim=-1, keepdim=True)
        with intervene(self.model, {site: lambda _value, _positions: given}):
            truth = run_logits(self.model, ids, logits_at=columns)
        hidden = kept[below[0]] if below else None
        return (self.resume_attended(layer, hidden, given, ids, logits_at=columns) - truth).abs().max().item()

    def _view(self, layer: int, hidden: Tensor | None) -> nn.Module:
        """Make a model of the same length that continues from `hidden` after block `layer`."""
        root = node = _twin(self.model)
        for name in self._path.split("."):
            child = _twin(node.get_submodule(name))
            node._modules[name] = child
            node = child
        for index in range(layer + 1):
            given = hidden if index == layer else None
            node._modules[str(index)] = _Stub(node.get_submodule(str(index)), given)
        return root
