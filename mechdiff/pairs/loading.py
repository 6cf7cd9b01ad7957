"""Load the models of a pair: frozen, in evaluation mode, and probed before anything is measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mechdiff.errors import PairError, cut, told
from mechdiff.interventions.generation import context_length
from mechdiff.interventions.hooks import get_blocks, record
from mechdiff.interventions.sites import Site
from mechdiff.pairs.placement import placement
from mechdiff.pairs.sources import UNREADABLE, fingerprint, model_folder
from mechdiff.pairs.spec import ModelSpec, PairSpec
from mechdiff.pairs.tokenizers import SharedVocab, load_tokenizer

ROWS_FILE = "new_rows.safetensors"
ADAPTERS = ("ADALORA", "BOFT", "HRA", "IA3", "LOHA", "LOKR", "LORA", "OFT", "VERA")
"""Kinds of adapters that change weights and nothing else. A learnt prompt cannot be merged, and names a
tokenizer to fetch."""
_LOADED: dict[tuple[str, str], LoadedPair] = {}


@dataclass(frozen=True)
class LoadedModel:
    """A frozen, probed model with its tokenizer.

    Attributes:
        role: ``base``, ``tuned`` or ``reference``.
        model: The language model: evaluation mode, no gradients for parameters.
        tokenizer: Its tokenizer.
        fingerprint: Hash of its weights and config.
        depth: Number of blocks.
        width: Width of the residual stream.
        num_heads: Query heads per block.
        head_dim: Width of one head's z.
        tied: Whether the unembedding is the embedding.
    """

    role: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    depth: int
    width: int
    num_heads: int
    head_dim: int
    tied: bool

    @property
    def device(self) -> torch.device:
        """Where the model lives, or its embedding if it is spread over several devices."""
        return self.model.device

    @property
    def spread(self) -> bool:
        """Whether the model lies on several devices, between which it moves its states itself."""
        return len({str(place) for place in getattr(self.model, "hf_device_map", {}).values()}) > 1

    @property
    def context_length(self) -> int:
        """Most tokens that the model takes; without a limit a number larger than any text."""
        return context_length(self.model)


class LoadedPair:
    """The models of a pair, each loaded when it is first asked for.

    Args:
        spec: A checked pair.
        device: Where the models go.
    """

    def __init__(self, spec: PairSpec, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)

    @cached_property
    def base(self) -> LoadedModel:
        """The model before tuning."""
        return self._load("base", self.spec.base)

    @cached_property
    def tuned(self) -> LoadedModel:
        """The model after tuning."""
        return self._load("tuned", self.spec.tuned)

    @cached_property
    def reference(self) -> LoadedModel | None:
        """Their common ancestor, where the pair names one."""
        return self._load("reference", self.spec.reference) if self.spec.reference else None

    @cached_property
    def shared(self) -> SharedVocab:
        """The tokens that both models have, by their bytes."""
        return SharedVocab(self.base.tokenizer, self.tuned.tokenizer)

    def _load(self, role: str, spec: ModelSpec) -> LoadedModel:
        dtype = getattr(torch, self.spec.dtype)
        return load_model(spec, role=role, dtype=dtype, device=self.device, cards=self.spec.cards)


def load_pair(spec: PairSpec, device: torch.device | str = "cpu") -> LoadedPair:
    """Return the pair of a spec; the same spec and device give the same object: one copy serves a run.

    Raises:
        PairError: If the spec is not valid.
    """
    key = (repr(spec.check()), str(device))
    if key not in _LOADED:
        _LOADED.clear()  # two 8B models fill a card: never hold an earlier pair as well
        _LOADED[key] = LoadedPair(spec, device)
    return _LOADED[key]


def load_model(
    spec: ModelSpec,
    role: str = "base",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cards: int = 1,
) -> LoadedModel:
    """Load, grow, merge, freeze and probe one model.

    Args:
        spec: Where it comes from.
        role: ``base``, ``tuned`` or ``reference``.
        dtype: Precision in which it runs.
        device: Where it goes, or where the first of its cards is.
        cards: GPUs that it is split over.

    Raises:
        PairError: If files are missing or do not fit each other.
    """
    key = f"pair.{role}.id"
    folder = model_folder(spec, key)
    identity = fingerprint(folder)
    tokenizer = load_tokenizer(folder)
    place = placement(folder, torch.device(device), cards)
    model = _read(folder, dtype, key, place)
    if spec.adapter:
        adapter = Path(spec.adapter)
        model = _adapted(model, adapter, f"pair.{role}.adapter")
        identity = f"{identity}+{fingerprint(adapter)}"
        if (adapter / "tokenizer").is_dir():
            tokenizer = load_tokenizer(adapter / "tokenizer")
    table: Any = model.get_input_embeddings()
    rows = len(table.weight)
    if len(tokenizer) > rows:
        raise PairError(
            f"the tokenizer has {len(tokenizer)} tokens; allowed: up to {rows}, the embedding's rows; add "
            f"{ROWS_FILE} to the adapter (key: {key})"
        )
    model.requires_grad_(False).eval()
    if place is None:
        model.to(device)  # type: ignore[arg-type]
    return probed(role, model, tokenizer, identity)


def _read(folder: Path, dtype: torch.dtype, key: str, place: dict[str, str] | None) -> PreTrainedModel:
    """Read a model whole: what its files lack is never filled with random numbers."""
    options: Any = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, "device_map": place}
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except UNREADABLE as error:
        raise PairError(
            f"{folder} cannot be loaded as a causal language model: {told(error)} (key: {key})"
        ) from error
    model, info = loaded
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise PairError(f"{folder} lacks {len(lacking)} weights, such as {lacking[0]} (key: {key})")
    return model


def grow_embeddings(model: PreTrainedModel, rows: Tensor, first_id: int | None = None) -> None:
    """Write embedding rows for added tokens, in place; tied embeddings stay tied.

    Args:
        model: The model.
        rows: Rows ``(added, d_model)`` in the order of the new ids.
        first_id: Id of the first row, the size of the present table by default; a gap is filled with zeros.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    old = embedding.weight.data
    first = old.shape[0] if first_id is None else first_id
    table = old.new_zeros(max(first + rows.shape[0], old.shape[0]), old.shape[1])
    table[: old.shape[0]] = old
    table[first : first + rows.shape[0]] = rows.to(old)
    tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
    embedding.weight, embedding.num_embeddings = nn.Parameter(table), table.shape[0]
    if isinstance(head, nn.Linear):
        # Without rows of its own an untied head gives an added token the logit 0, as a padding row would.
        added = len(table) - len(old)
        head.weight = embedding.weight if tied else _with_zeros(head.weight, added)
        head.out_features = len(table)
        if head.bias is not None:
            head.bias = _with_zeros(head.bias, added)
    model.config.vocab_size = table.shape[0]


def _with_zeros(weight: Tensor, rows: int) -> nn.Parameter:
    return nn.Parameter(torch.cat([weight.data, weight.data.new_zeros(rows, *weight.shape[1:])]))


def _adapted(model: PreTrainedModel, folder: Path, key: str) -> PreTrainedModel:
    from peft import PeftModel  # slow to import, and only adapters need it

    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if about["peft_type"] not in ADAPTERS:
            raise ValueError(f"peft_type is {cut(about['peft_type'])}; allowed: {', '.join(ADAPTERS)}")
        if (folder / ROWS_FILE).is_file():
            with safe_open(folder / ROWS_FILE, framework="pt") as file:
                first = (file.metadata() or {}).get("first_id")
                grow_embeddings(model, file.get_tensor("rows"), int(first) if first else None)
        return PeftModel.from_pretrained(model, folder, use_safetensors=True).merge_and_unload()
    except UNREADABLE as error:
        raise PairError(f"{folder} does not fit the model: {told(error)} (key: {key})") from error


@torch.no_grad()
def probed(
    role: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: str
) -> LoadedModel:
    """Describe a frozen model: run two tokens and read off the shapes instead of trusting the config.

    Args:
        role: ``base``, ``tuned`` or ``reference``.
        model: The model.
        tokenizer: Its tokenizer.
        identity: Hash of its weights and config.

    Raises:
        PairError: If its logits are not finite.
    """
    depth = len(get_blocks(model))
    ids = torch.arange(2, device=model.device)[None]
    sites = [Site(depth - 1), Site(0, "head_z")]
    with record(model, sites) as seen:
        logits = model(input_ids=ids, use_cache=False).logits
    residual, z = seen[sites[0]], seen[sites[1]]
    if not logits.isfinite().all():
        raise PairError(
            f"two tokens through {type(model).__name__} of {role} in {model.dtype} give NaN or "
            "infinite logits; allowed: finite ones; try float32 (key: pair.dtype)"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
    return LoadedModel(
        role,
        model,
        tokenizer,
        identity,
        depth=depth,
        width=residual.shape[-1],
        num_heads=z.shape[-2],
        head_dim=z.shape[-1],
        tied=tied,
    )
