"""Where the numbers of a run come from."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import mechdiff
from mechdiff.pairs.alignment import template_tokens
from mechdiff.pairs.loading import LoadedModel, LoadedPair
from mechdiff.pairs.tokenizers import tokenizer_hashes

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "peft", "h5py", "safetensors", "jsonargparse")


def provenance(pair: LoadedPair, seed: int, stores: Mapping[str, str]) -> dict[str, Any]:
    """Describe the code, the models and the texts behind a run.

    Args:
        pair: The pair, loaded.
        seed: Seed of every generator.
        stores: Key of each model's activation store.
    """
    files = [*pair.spec.prompts, *([pair.spec.openings] if pair.spec.openings else [])]
    return {
        **software(),
        "seed": seed,
        "device": str(pair.device),
        "dtype": pair.spec.dtype,
        "pair": asdict(pair.spec),
        "models": {m.role: _model(m) for m in (pair.base, pair.tuned)},
        "shared_vocabulary": pair.shared.size,
        "prompts": {Path(f).name: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files},
        "stores": dict(stores),
    }


def software() -> dict[str, Any]:
    """Describe the code and what it runs on."""
    return {
        "mechdiff": mechdiff.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def _model(loaded: LoadedModel) -> dict[str, Any]:
    """Describe a model; `tokenizer` and `template` are those in the manifest of its activation store."""
    tokenizer, template = tokenizer_hashes(loaded.tokenizer, *template_tokens(loaded.tokenizer))
    return {
        "class": type(loaded.model).__name__,
        "weights": loaded.fingerprint,
        "tokenizer": tokenizer,
        "template": template,
        "vocabulary": len(loaded.tokenizer),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this runs from, marked if it was changed; None outside one."""
    run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
