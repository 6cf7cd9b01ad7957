"""Say which rows of a store are sound, and how the others are made again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mechdiff.data.manifest import MANIFEST, Contents, Pass, Shard, passes, read_json
from mechdiff.data.store import ActivationStore
from mechdiff.errors import StoreError

AGAIN = "run the command that made it again: what is sound is kept, and only the rest is computed"
REMOVE = f"remove it, then {AGAIN}"


def look(folder: Path, wrong: list[str]) -> Iterator[str]:
    """Yield what a store holds, a line for each pass, after reading every byte of it.

    Args:
        folder: The store's folder.
        wrong: Receives what is wrong, and what to do about it.
    """
    try:
        contents = Contents.read(folder)
    except StoreError as error:
        wrong.append(f"{error}; {REMOVE}" if (folder / MANIFEST).exists() else str(error))
        return
    about, before = contents.identity, len(wrong)
    yield f"{folder}: {len(contents.examples)} prompts, {about.positions} positions, {about.dtype}"
    for path in sorted(folder.glob("pass-*")):
        if not (path / MANIFEST).exists():
            committed = list(path.glob("shard-*.json"))
            wrong.append(f"{path} is not complete: {len(committed)} shards are; {AGAIN}")
            continue
        try:
            part = Pass.read(path, about.key)
        except StoreError as error:
            wrong.append(f"{error}; {REMOVE}")
            continue
        yield _rows(part, wrong)
    if len(wrong) == before:
        wrong.extend(_contradictions(folder, contents))


def _contradictions(folder: Path, contents: Contents) -> Iterator[str]:
    """Say where the files of a store, sound each by itself, contradict their manifests or each other."""
    try:
        store = ActivationStore(folder, contents)
        for part in passes(folder, contents.identity.key):
            for site in part.widths:
                store.read(site, torch.tensor(part.starts[:-1]))
    except StoreError as error:
        yield f"{error}; {AGAIN}"


def _rows(part: Pass, wrong: list[str]) -> str:
    """Say which rows of a pass are sound."""
    sound: list[list[int]] = []
    for shard, start, end in zip(part.shards, part.starts, part.starts[1:], strict=False):
        fault = _fault(part.folder, shard)
        if fault is not None:
            wrong.append(f"{fault} (rows {start} to {end - 1}); {AGAIN}")
        elif sound and sound[-1][1] == start:
            sound[-1][1] = end
        else:
            sound.append([start, end])
    sites = ", ".join(map(str, part.widths))
    kept = ", ".join(f"{start} to {end - 1}" for start, end in sound) or "none"
    size = f"{len(part.shards)} shards, {part.starts[-1]} rows"
    return f"{part.folder.name}: {sites}; {size}; sound rows: {kept}"


def _fault(folder: Path, shard: Shard) -> str | None:
    """Return what is wrong with a shard, or with the record that a resumed run trusts."""
    try:
        shard.check(folder)
        record = (folder / shard.file).with_suffix(".json")
        if read_json(record).get("xxh3") != shard.xxh3:
            return f"{record} is not the record of {shard.file}"
    except StoreError as error:
        return str(error).partition("; run ")[0]
    return None
