"""Keep a store, or the folder of a study, to one writing run at a time, of however many processes."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from mechdiff.data.manifest import ROOT, unwritable
from mechdiff.errors import StoreError
from mechdiff.files import PART

log = logging.getLogger(__name__)

LOCK, OWNER = ".lock", ".owner"
"""The file that is locked, and the one that says by whom: whoever tries a lock empties its file."""


def first() -> bool:
    """Tell whether this is the first process; known from the environment, before a trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def alone(folder: Path, key: str = ROOT) -> Iterator[None]:
    """Keep other runs away from a folder while this one writes, and clear away what a killed one was writing.

    A second run waits, and says for whom; where several processes were started together it is refused.

    Args:
        folder: The folder, which is made.
        key: What the user calls it.

    Raises:
        StoreError: If another run is writing, or the folder cannot be written to.
    """
    if not first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=-1)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _wait(folder, lock, key)
        (folder / OWNER).write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")
        for part in folder.rglob(f".*{PART}"):
            part.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder, error, key) from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / OWNER).unlink()
        lock.release()


def _wait(folder: Path, lock: FileLock, key: str) -> None:
    """Wait for the run that writes.

    Processes that were started together must all see the same store: waiting would let it change.
    """
    try:
        owner = f"process {(folder / OWNER).read_text(encoding='utf-8')}"
    except OSError:
        owner = "another run"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise StoreError(f"{owner} is writing {folder}; wait for it (key: {key})")
    log.warning("%s is writing %s; waiting for it", owner, folder)
    lock.acquire()
