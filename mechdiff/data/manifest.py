"""Say what a store of activations was made from and which files belong to it.

1. A store is the folder `<root>/<key>`; the key hashes whatever changes a number: weights, tokenizer, chat
   template, texts, which positions are kept, type on disk. `manifest.json` holds them in clear, with the
   examples and the tokens of the template.
2. Sites are extracted in passes, `pass-<sites>/shard-00000.h5` and so on. A pass exists once its own
   `manifest.json` does: widths, and rows and checksum of every shard. Without it the folder is ignored.
3. Manifests are written whole or not at all, and name files of their own folder only. Nothing in a store is
   a symbolic link.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from mechdiff.errors import StoreError, cut, told
from mechdiff.files import write_text
from mechdiff.interventions.sites import Site

SCHEMA = 2
"""Counts changes of the layout, and of how activations are computed where that moves last digits."""
MANIFEST = "manifest.json"
ROOT = "extraction.root"
"""The key by which a user says where stores are."""
_SHARD = re.compile(r"shard-\d{5}\.h5")
_SETTLED = 1.0  # seconds: a change within one tick of the clock would leave a file's times as they were
_SOUND: set[tuple[int | str, ...]] = set()  # files that this process has verified, as they were then


@dataclass(frozen=True)
class StoreIdentity:
    """Whatever changes a number in a store.

    Attributes:
        model: Fingerprint of the weights, with the type that they compute in.
        tokenizer: Hash of the tokenizer.
        template: Hash of the chat template.
        prompts: Digest of ids and texts.
        positions: Which rows are kept: `all`, `user` or `last`.
        dtype: Type on disk: `float32` or `bfloat16`.
    """

    model: str
    tokenizer: str
    template: str
    prompts: str
    positions: str
    dtype: str

    @property
    def key(self) -> str:
        """Name of the store's folder: 16 hexadecimal digits."""
        text = json.dumps([SCHEMA, asdict(self)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Example:
    """What a store remembers of a prompt; the text itself stays in the prompt file."""

    id: str
    lang: str
    label: str
    topic: str
    template: str


@dataclass(frozen=True)
class Contents:
    """The manifest of a store.

    Attributes:
        identity: What it is made from.
        examples: The prompts.
        prefix: Bytes of each template token before the user's text.
        suffix: Bytes of each template token after it.
    """

    identity: StoreIdentity
    examples: list[Example]
    prefix: list[bytes]
    suffix: list[bytes]

    @classmethod
    def read(cls, folder: Path) -> Contents:
        """Read the manifest in a store's folder.

        Raises:
            StoreError: If there is none, or it is malformed.
        """
        body = read_json(folder / MANIFEST)
        try:
            identity = StoreIdentity(**_texts(body["identity"]))
            examples = [Example(**_texts(example)) for example in body["examples"]]
            prefix, suffix = ([bytes.fromhex(t) for t in body["template"][k]] for k in ("prefix", "suffix"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{folder / MANIFEST} is not the manifest of a store: {told(error)}") from error
        return cls(identity, examples, prefix, suffix)

    def write(self, folder: Path) -> None:
        """Write the manifest into a store's folder."""
        template = {
            "prefix": [token.hex() for token in self.prefix],
            "suffix": [t.hex() for t in self.suffix],
        }
        described = {"identity": asdict(self.identity), "template": template}
        examples = [asdict(example) for example in self.examples]
        write_json(folder / MANIFEST, {"schema": SCHEMA, **described, "examples": examples})


@dataclass(frozen=True)
class Shard:
    """One committed file of a pass: its name, rows and checksum (XXH3, 64 bits)."""

    file: str
    rows: int
    xxh3: str

    def check(self, folder: Path) -> None:
        """Refuse a file that is missing or not the one that was committed.

        A process reads a file for this once, and again if its size, time or place on the disk has changed.

        Raises:
            StoreError: If so, naming the file.
        """
        named = _SHARD.fullmatch(self.file)
        path = folder / (self.file if named else cut(self.file)[1:-1])
        if not named or path.is_symlink():
            raise StoreError(
                f"{path} is not a shard: allowed are regular files shard-<5 digits>.h5 in the folder"
            )
        if not path.is_file():
            raise StoreError(f"{path} is missing from the store; run `mechdiff extract` to make it again")
        about = path.stat()
        seen = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns, self.xxh3)
        if seen in _SOUND:
            return
        found = checksum(path)
        if found != self.xxh3:
            reason = self._whose(folder, found)
            raise StoreError(f"{path} is damaged: {reason}; run `mechdiff extract` to make it again")
        if time.time() - about.st_mtime > _SETTLED:
            _SOUND.add(seen)

    def _whose(self, folder: Path, found: str) -> str:
        """Say why a file has the checksum that was found: it may be another one that was committed here."""
        for record in sorted(folder.glob("shard-*.json")):
            try:
                body = read_json(record)
            except StoreError:
                continue
            if body.get("xxh3") == found:
                other = str(body.get("file"))
                return f"it is {other}" if other != self.file else f"{MANIFEST} is that of another run"
        return "its checksum has changed"

    def intact(self, folder: Path) -> bool:
        """Tell whether `check` accepts the file."""
        try:
            self.check(folder)
        except StoreError:
            return False
        return True


@dataclass(frozen=True)
class Pass:
    """Some sites of a store, in shards.

    Attributes:
        folder: Where the shards are.
        widths: Width of the rows at each site.
        shards: In the order of their rows.
    """

    folder: Path
    widths: dict[Site, int]
    shards: list[Shard]

    @staticmethod
    def name(sites: Iterable[Site]) -> str:
        """Return the name of the folder of a pass: a hash of its sites."""
        text = json.dumps([str(site) for site in sorted(sites)])
        return f"pass-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    @classmethod
    def read(cls, folder: Path, key: str) -> Pass:
        """Read the manifest of a pass.

        Raises:
            StoreError: If it is malformed or belongs to another store.
        """
        body = read_json(folder / MANIFEST)
        try:
            owner = body["key"]
            widths = {Site.parse(name): _count(width) for name, width in body["sites"].items()}
            shards = [Shard(str(s["file"]), _count(s["rows"]), str(s["xxh3"])) for s in body["shards"]]
            if not shards or len(widths) < max(1, len(body["sites"])):
                raise ValueError("it names no shard or no site, or one twice")
            if len({shard.file for shard in shards}) < len(shards):
                raise ValueError("it names a shard twice")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{folder / MANIFEST} is not the manifest of a pass: {told(error)}") from error
        if owner != key:
            raise StoreError(f"{folder / MANIFEST} belongs to store {cut(str(owner))[1:-1]}, not to {key}")
        if folder.name != cls.name(widths):
            raise StoreError(f"{folder / MANIFEST} is that of another pass, {cls.name(widths)}; remove it")
        return cls(folder, widths, shards)

    def write(self, key: str) -> None:
        """Write the manifest; from then on the pass exists."""
        sites = {str(site): width for site, width in self.widths.items()}
        shards = [asdict(shard) for shard in self.shards]
        write_json(self.folder / MANIFEST, {"schema": SCHEMA, "key": key, "sites": sites, "shards": shards})

    def check(self) -> None:
        """Check every shard.

        Raises:
            StoreError: If one is missing or damaged.
        """
        for shard in self.shards:
            shard.check(self.folder)

    @cached_property
    def starts(self) -> list[int]:
        """First row of each shard, and the number of rows."""
        return list(accumulate((shard.rows for shard in self.shards), initial=0))


def passes(folder: Path, key: str) -> list[Pass]:
    """Read the manifests of all complete passes of a store, without checking their shards.

    Raises:
        StoreError: If a manifest is malformed, or a pass is a link to somewhere else.
    """
    for link in filter(Path.is_symlink, sorted(folder.glob("pass-*"))):
        raise StoreError(f"{link} is a symbolic link; a store holds regular folders only")
    found = [path.parent for path in sorted(folder.glob(f"pass-*/{MANIFEST}"))]
    return [Pass.read(path, key) for path in found]


def checksum(path: Path) -> str:
    """Hash a file (XXH3, 64 bits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object written by this library.

    Raises:
        StoreError: If it is missing, a link, not an object, or of another schema.
    """
    if path.is_symlink():
        raise StoreError(f"{path} is a symbolic link; a store holds regular files only")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {error.strerror}; expected a store made by `mechdiff extract`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not JSON: {told(error)}") from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        raise StoreError(f"{path} is not of schema {SCHEMA}, the one that this version reads")
    return body


def _texts(body: dict[str, Any]) -> dict[str, str]:
    for name, value in body.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {cut(value)}, no text")
    return body


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**63:
        raise ValueError(f"{cut(value)} is no count")
    return value


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        StoreError: If the folder cannot be written to.
    """
    text = json.dumps(body, indent=1, ensure_ascii=False)
    try:
        write_text(path, text)
    except OSError as error:
        raise unwritable(path.parent, error) from error


def unwritable(folder: Path, error: OSError, key: str = ROOT) -> StoreError:
    """Say that a folder cannot be written to, and what became of it.

    Args:
        folder: A store, or a part of one.
        error: What the system said.
        key: What the user calls it.
    """
    reason = os.strerror(error.errno) if error.errno else str(error).strip().splitlines()[0]  # HDF5 says more
    return StoreError(f"cannot write to {folder}: {reason}; what is complete is kept (key: {key})")
