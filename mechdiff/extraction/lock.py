"""Keep a store to one writing run at a time, of however many processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from mechdiff.errors import StoreError


def first() -> bool:
    """Tell whether this is the first process; known from the environment, before a trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs away from a store while this one writes."""
    if not first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=-1)
        # Processes that were started together must all see the same store: waiting would let it change.
        lock.acquire(timeout=0 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else -1)
    except Timeout as error:
        raise StoreError(f"another run is writing {folder}; wait for it (key: extraction.root)") from error
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror} (key: extraction.root)") from error
    try:
        yield
    finally:
        lock.release()
