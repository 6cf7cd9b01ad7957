"""How activations are extracted and kept, and the room that they take."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mechdiff.data.store import DTYPES
from mechdiff.errors import ConfigError, StoreError
from mechdiff.extraction.plan import KEPT, PlannedShard
from mechdiff.interventions.sites import Site
from mechdiff.pairs.loading import LoadedModel

COLUMNS = {"example": np.int32, "region": np.int8, "offset": np.int32, "position": np.int32}
"""What is kept of each row beside its activations."""
KINDS = {"float32": np.float32, "bfloat16": np.uint16}
"""Types of numpy on disk."""
HEADERS = 2**16
"""Bytes of a file, at most, that are neither rows nor activations."""
GIB = 2**30


@dataclass(frozen=True)
class ExtractionSpec:
    """How activations are extracted and kept."""

    root: str = "stores"
    """Folder of all stores."""
    positions: Literal["all", "user", "last"] = "all"
    """Rows kept: all after the template's fixed beginning, those of the user's text, or the last one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type on disk; the model computes in its own."""
    tokens_per_batch: int = 1024
    """Tokens of a batch, padding included."""
    batches_per_shard: int = 16
    """Batches per file; an interrupted run loses at most one file per process."""
    compile: bool = False
    """Compile norms and MLPs: an eighth faster on an H100 where the disk keeps up, with other rounding."""

    def check(self) -> ExtractionSpec:
        """Refuse values out of range.

        Raises:
            ConfigError: Naming the value, the allowed range and the key.
        """
        for name, allowed in (("positions", tuple(KEPT)), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                got = f"{getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                raise ConfigError(f"{name} is {got} (key: extraction.{name})")
        for name in ("tokens_per_batch", "batches_per_shard"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; allowed: 1 or more (key: extraction.{name})")
        return self


def width(model: LoadedModel, site: Site) -> int:
    """Return the width of the rows that a store keeps of a site."""
    if site.component == "head_z":
        return model.num_heads * model.head_dim
    return model.width * (model.num_heads if site.component == "head_out" else 1)


def size(shard: PlannedShard, columns: int, dtype: str) -> int:
    """Return the bytes that a shard takes, at most.

    Args:
        shard: What it holds.
        columns: Width of all sites together.
        dtype: Type on disk.
    """
    beside = sum(np.dtype(kind).itemsize for kind in COLUMNS.values())
    return shard.rows * (columns * np.dtype(KINDS[dtype]).itemsize + beside) + HEADERS


def check_room(folder: Path, missing: Iterable[tuple[int, Sequence[PlannedShard]]], dtype: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: The store's folder.
        missing: Shards to write, each time with the width of all their sites together.
        dtype: Type on disk.

    Raises:
        StoreError: If less is free than they take.
    """
    need = sum(size(shard, columns, dtype) for columns, shards in missing for shard in shards)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StoreError(
            f"{folder} needs {need / GIB:.3g} GiB more and {free / GIB:.3g} GiB are free; allowed: less than "
            "is free (keys: extraction.root, extraction.positions, extraction.dtype, layers)"
        )
