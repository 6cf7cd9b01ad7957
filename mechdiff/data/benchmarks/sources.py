"""Rows of a benchmark, from a local file, a local folder, or the hub at a pinned revision.

1. A name that ends in .jsonl, .jsonl.gz or .parquet, or that exists here, is local; anything else is a hub
   id, with ``@revision`` if wanted.
2. The hub is asked one short question before anything is fetched: without a network the cache answers, or one
   line says what to do.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechdiff.data.lines import parse
from mechdiff.errors import PromptError

Row = dict[str, Any]
FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
PROBE_SECONDS = 5.0
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the hub.

    Attributes:
        id: Owner and name.
        revision: Commit that was checked; None to ask the hub for the newest and report it.
        split: Split to read; None for all of them.
        configs: Configurations, read one after the other.
        folder: Folder inside the repository that holds the files, where configurations are not declared.
    """

    id: str
    revision: str | None = None
    split: str | None = "test"
    configs: tuple[str | None, ...] = (None,)
    folder: str | None = None


@dataclass(frozen=True)
class Rows:
    """Rows, each with its place for messages, and the commit they are from (None if local)."""

    rows: list[tuple[str, Row]]
    revision: str | None


def read_rows(source: str, hub: HubSource, sample: str, key: str) -> Rows:
    """Read all rows of a source.

    Args:
        source: File, folder or hub id.
        hub: Revision, split and configurations to use; the revision only if the id is the same.
        sample: Local file to propose if the hub cannot be reached.
        key: Configuration key for messages.

    Raises:
        PromptError: If it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return Rows(list(_folder(path, hub, source, key)), None)
    if path.is_file() or source.endswith(FORMATS):
        return Rows(list(_file(path, key)), None)
    if not _HUB_ID.fullmatch(source):
        raise PromptError(
            f"{source!r} is no file ({', '.join(FORMATS)}), no folder and no hub id owner/name (key: {key})"
        )
    name, _, asked = source.partition("@")
    folder, revision = _snapshot(
        name, asked or (hub.revision if name == hub.id else None), hub.folder, sample, key
    )
    return Rows(list(_folder(folder, hub, source, key)), revision)


def _file(path: Path, key: str) -> Iterator[tuple[str, Row]]:
    if not path.is_file():
        raise PromptError(f"cannot read benchmark file {path}: no such file (key: {key})")
    if path.name.endswith(".parquet"):
        yield from _parquet(path, key)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _jsonl(path, key)
    else:
        raise PromptError(f"benchmark file {path} must end in {', '.join(FORMATS)} (key: {key})")


def _jsonl(path: Path, key: str) -> Iterator[tuple[str, Row]]:
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"benchmark file {path} is not UTF-8: byte {error.start} (key: {key})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise PromptError(f"benchmark file {path} is not a gzip file (key: {key})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except PromptError as error:
            raise PromptError(f"{path}:{number}: {error}") from error
        if not isinstance(row, dict):
            raise PromptError(
                f"{path}:{number}: a line must be an object, keyed by column; found {type(row).__name__}"
            )
        yield f"{path}:{number}", row


def _parquet(path: Path, key: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"benchmark file {path} is not a Parquet file (key: {key})") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _folder(folder: Path, hub: HubSource, source: str, key: str) -> Iterator[tuple[str, Row]]:
    """Read a folder laid out like a hub repository, as its own card or its file names declare."""
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    root = folder / hub.folder if hub.folder and (folder / hub.folder).is_dir() else folder
    for config in hub.configs:
        try:
            found = load_dataset(str(root), config)
        except (DatasetNotFoundError, FileNotFoundError, ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise PromptError(
                f"{source} cannot be read as a data set (configuration {config!r}): {reason} (key: {key})"
            ) from error
        assert isinstance(found, DatasetDict)
        if hub.split is not None and hub.split not in found:
            raise PromptError(
                f"{source} has no split {hub.split!r}; found {', '.join(map(str, found))} (key: {key})"
            )
        for split in [hub.split] if hub.split else list(found):
            label = "/".join([source, *filter(None, [config, str(split)])])
            for number, row in enumerate(found[split], 1):
                yield f"{label}: row {number}", {**row, "_config": config, "_split": str(split)}


def _snapshot(name: str, revision: str | None, folder: str | None, sample: str, key: str) -> tuple[Path, str]:
    """Return the local copy of a hub data set and its commit."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    elsewhere = f"give a local file with the same columns, such as {sample} (key: {key})"
    patterns = ["README.md", f"{folder}/*"] if folder else None

    def get(commit: str | None, offline: bool) -> tuple[Path, str]:
        path = Path(
            snapshot_download(
                name, repo_type="dataset", revision=commit, allow_patterns=patterns, local_files_only=offline
            )
        )
        return path, path.name  # the folder of a snapshot is named by its commit

    try:
        if HF_HUB_OFFLINE:
            return get(revision, offline=True)
        # One quick question first: a download alone would retry for a long time.
        commit = HfApi().dataset_info(name, revision=revision, timeout=PROBE_SECONDS).sha
        return get(commit, offline=False)
    except GatedRepoError as error:
        raise PromptError(
            f"data set {name} is gated: accept its licence, then run `hf auth login`; or {elsewhere}"
        ) from error
    except RevisionNotFoundError as error:
        raise PromptError(f"data set {name} has no revision {revision!r}; {elsewhere}") from error
    except RepositoryNotFoundError as error:
        raise PromptError(
            f"data set {name} does not exist on the hub, or needs `hf auth login`; or {elsewhere}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise PromptError(
            f"data set {name} is not in the local cache and HF_HUB_OFFLINE is set; {elsewhere}"
        ) from error
    except (HTTPError, OSError) as error:
        with suppress(LocalEntryNotFoundError):  # what was fetched before will do
            return get(revision, offline=True)
        raise PromptError(
            f"data set {name} cannot be reached on the hub and is not in the local cache; {elsewhere}"
        ) from error
