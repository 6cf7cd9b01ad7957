"""Write files whole or not at all, and say in one line why one cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"
"""How the name of a file ends that is being written."""
_PLACE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EIO,
    errno.ESTALE,
}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name beside a file; what is written there takes the file's place at the end, or is removed.

    The name is this process's own: of two that write the same file, neither touches what the other writes.

    Args:
        path: The file; its folder exists.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):  # the folder may be what has gone
            part.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def blocked(error: OSError) -> str | None:
    """Say why a file cannot be written or read; None where the place is not the reason.

    Args:
        error: What the system said. A file that is missing from a folder that is there is no fault of the
            place.
    """
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    gone = error.errno == errno.ENOENT and where is not None and not Path(where).parent.is_dir()
    if error.errno not in _PLACE and not gone:
        return None
    at = f" {where}" if where is not None else ""
    return f"cannot write or read{at}: {error.strerror or os.strerror(error.errno or 0)}"
