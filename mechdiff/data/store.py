"""Read the activations of one model from disk.

1. Each shard has columns `rows/{example, region, offset, position}` and one array per site, `sites/<site>`.
2. Rows lie in the same order in every pass: texts by length, then as given; within a text as the tokens.
3. Every file is checked when the store is opened, and again when it is read after it has changed. Nothing is
   filled in for what is missing: arrays lie whole in their own file.
4. HDF5 has no bfloat16 that h5py reads: it is kept as the bits of a uint16, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import h5py
import numpy as np
import torch
from torch import Tensor

from mechdiff.data.manifest import MANIFEST, Contents, Pass, Shard, StoreIdentity, passes
from mechdiff.errors import StoreError, cut
from mechdiff.interventions.sites import POSITIONS, SUFFIX, USER, Site

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AT_ONCE = 1 << 19  # bytes that are read before they are put in their places
KEPT: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
"""What each is on disk."""
INTEGERS = tuple(map(np.dtype, (np.int8, np.int16, np.int32, np.int64)))
"""Types of the columns that say where rows come from."""

Named = TypeVar("Named", Site, str, Site | str)


class Rows(NamedTuple):
    """Where each row comes from, integer columns of shape `(rows,)`.

    Attributes:
        example: Index into the store's examples.
        region: `USER` or `SUFFIX`.
        offset: Byte of the user's text where the token ends; in the template, index from its end (last: -1).
        position: Index of the token in the prompt.
    """

    example: Tensor
    region: Tensor
    offset: Tensor
    position: Tensor


class ActivationStore:
    """The activations of one model on a list of prompts.

    It keeps no file open, so it can be sent to workers.

    Attributes:
        folder: Where it is.
        identity: What it was made from.
        examples: The prompts, by the index in `rows.example`.
        prefix: Bytes of each template token before the user's text.
        suffix: Bytes of each template token after it.
        rows: Where each row comes from.
        sites: The sites it holds, in order.
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder, self.identity, self.examples = folder, contents.identity, contents.examples
        self.prefix, self.suffix = contents.prefix, contents.suffix
        if self.identity.dtype not in DTYPES:
            raise StoreError(f"{folder / MANIFEST} has dtype {cut(self.identity.dtype)}, which is not read")
        found = passes(folder, self.identity.key)
        if not found:
            raise StoreError(f"{folder} holds no complete pass; run `mechdiff extract`")
        self._passes = {site: part for part in reversed(found) for site in part.widths}
        self.sites = sorted(self._passes)
        for part in found:
            _check_sizes(part, KEPT[self.identity.dtype].itemsize)
        columns = [_read_rows(part) for part in found]
        self.rows = columns[0]
        for part, other in zip(found, columns, strict=True):
            if not all(torch.equal(a, b) for a, b in zip(other, self.rows, strict=True)):
                raise StoreError(
                    f"{part.folder} and {found[0].folder} hold different rows; remove one of them"
                )
        if len(self) and not 0 <= int(self.rows.example.min()) <= int(self.rows.example.max()) < len(
            self.examples
        ):
            raise StoreError(f"{folder / MANIFEST} lists {len(self.examples)} examples; its rows name more")

    @classmethod
    def open(cls, folder: str | Path, identity: StoreIdentity | None = None) -> ActivationStore:
        """Open a store and check all of its files.

        Args:
            folder: The store's folder, `<root>/<key>`.
            identity: What it must have been made from, if that is known.

        Raises:
            StoreError: If it is missing, incomplete or damaged, or was made from something else.
        """
        folder = Path(folder)
        contents = Contents.read(folder)
        for field in fields(identity) if identity else ():
            want, have = getattr(identity, field.name), getattr(contents.identity, field.name)
            if want != have:
                differs = f"another {field.name}: {have!r}, wanted {want!r}"
                raise StoreError(f"{folder} was made from {differs} (key: extraction)")
        for part in passes(folder, contents.identity.key):
            part.check()
        return cls(folder, contents)

    def __len__(self) -> int:
        return self.rows.example.numel()

    @cached_property
    def groups(self) -> Tensor:
        """Index into `POSITIONS` of each row, `(rows,)`.

        Where no template follows the user's text, its last token is the last one before the answer.
        """
        example, region, offset, position = self.rows
        groups = torch.where(region == USER, POSITIONS.index("user"), POSITIONS.index("template"))
        last = (region == SUFFIX) & (offset == -1)
        if not self.suffix:
            ends = torch.full((len(self.examples),), -1).scatter_reduce(0, example, position, "amax")
            last = position == ends[example]
        return torch.where(last, POSITIONS.index("last"), groups)

    def width(self, site: Site | str) -> int:
        """Return the width of the rows at a site; that of all heads together for head sites."""
        return self._pass(site).widths[Site.parse(site)]

    def read(self, site: Site | str, rows: Tensor | None = None) -> Tensor:
        """Read rows of a site.

        Args:
            site: Which activations.
            rows: Indices `(n,)` in any order; all rows by default.

        Returns:
            Activations `(n, width)`, float32.

        Raises:
            StoreError: If the store does not hold the site or a shard cannot be read.
        """
        return self.read_sites([site], rows)[site]

    def read_sites(self, sites: Iterable[Named], rows: Tensor | None = None) -> dict[Named, Tensor]:
        """Read the same rows of several sites; a file that holds more than one is opened once.

        Args:
            sites: Which activations.
            rows: Indices `(n,)` in any order; all rows by default.

        Returns:
            Activations by site, `(n, width)`, float32.

        Raises:
            StoreError: If the store does not hold a site or a shard cannot be read.
        """
        index = np.arange(len(self)) if rows is None else rows.numpy()
        assert index.size == 0 or (index.min() >= 0 and index.max() < len(self)), "row out of range"
        order = np.argsort(index, kind="stable")
        wanted, dtype = index[order], self.identity.dtype
        out = {site: np.empty((len(index), self.width(site)), np.float32) for site in sites}
        parts: dict[Path, tuple[Pass, list[Named]]] = {}
        for site in out:
            part = self._pass(site)
            parts.setdefault(part.folder, (part, []))[1].append(site)
        for part, held in parts.values():
            for shard, start, end in zip(part.shards, part.starts, part.starts[1:], strict=False):
                first, stop = np.searchsorted(wanted, [start, end])
                local, places = wanted[first:stop] - start, order[first:stop]
                if not local.size:
                    continue
                with _opened(part, shard) as file:
                    for site in held:
                        shape = shard.rows, out[site].shape[1]
                        begin = _array(file, f"sites/{Site.parse(site)}", shape, KEPT[dtype]).id.get_offset()
                        _gather(part.folder / shard.file, begin, local, places, out[site], dtype)
        return {site: torch.from_numpy(values) for site, values in out.items()}

    def blocks(self, site: Site | str, size: int = 4096) -> Iterator[Tensor]:
        """Read a site in order, `size` rows at a time."""
        for rows in torch.arange(len(self)).split(size):
            yield self.read(site, rows)

    def _pass(self, site: Site | str) -> Pass:
        site = Site.parse(site)
        if site not in self._passes:
            held = ", ".join(map(str, self.sites))
            raise StoreError(f"{self.folder} does not hold site {site}; it holds {held} (key: data.sites)")
        return self._passes[site]


def encode(values: Tensor, dtype: str) -> np.ndarray:
    """Turn activations into what is written; bfloat16 is kept as the bits of a uint16."""
    values = values.to(DTYPES[dtype]).contiguous()
    return values.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else values.numpy()


def decode(values: np.ndarray, dtype: str) -> Tensor:
    """Turn what was written back into activations, float32."""
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(values)


def _gather(
    path: Path, begin: int, local: np.ndarray, places: np.ndarray, out: np.ndarray, dtype: str
) -> None:
    """Read ascending rows of an array and put each in its place.

    An array lies in its file as it does in memory: HDF5 says where it begins, and neighbours are one request.
    A few rows are read at a time: they are still in the processor's cache when they are put in their places.

    Args:
        path: The file.
        begin: Byte at which the array begins.
        local: Rows of the array, ascending, `(n,)`.
        places: Row of `out` for each of them.
        out: `(rows, width)`, float32.
        dtype: Type on disk.

    Raises:
        OSError: If the file ends before the array does.
    """
    kind = KEPT[dtype]
    size = out.shape[1] * kind.itemsize
    some = np.empty((max(_AT_ONCE // size, 1), out.shape[1]), kind)
    with path.open("rb", buffering=0) as file:
        for start in range(0, len(local), len(some)):
            wanted = local[start : start + len(some)]
            cuts = (np.flatnonzero(np.diff(wanted) != 1) + 1).tolist()
            for low, high in zip([0, *cuts], [*cuts, len(wanted)], strict=True):
                file.seek(begin + int(wanted[low]) * size)
                if file.readinto(some[low:high].data) != (high - low) * size:
                    raise OSError(f"it ends before its row {wanted[high - 1]}")
            out[places[start : start + len(some)]] = decode(some[: len(wanted)], dtype).numpy()


@contextmanager
def _opened(part: Pass, shard: Shard) -> Iterator[h5py.File]:
    path = part.folder / shard.file
    shard.check(part.folder)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise StoreError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _array(file: h5py.File, name: str, shape: tuple[int, ...], *types: np.dtype) -> h5py.Dataset:
    """Return an array of numbers of one of some types that lies whole in its own file.

    One that is put together from other files, or was never written, would read as zeros where they are gone.
    """
    group, leaf = name.split("/")
    data = file[name]
    own = all(
        isinstance(place.get(key, getlink=True), h5py.HardLink)
        for place, key in ((file, group), (file[group], leaf))
    )
    plain = isinstance(data, h5py.Dataset) and not data.is_virtual and not data.external
    plain = plain and data.dtype in types  # never objects
    if not (own and plain and data.shape == shape and data.chunks is None and data.id.get_offset()):
        numbers = f"{shape} numbers of type {types[-1]}"
        what = f"{file.filename} does not hold {name} whole, as {numbers}"
        raise StoreError(f"{what}; remove it and {MANIFEST}")
    return data


def _check_sizes(part: Pass, size: int) -> None:
    """Refuse a manifest that says more than a shard holds: memory is reserved by its word."""
    width = sum(part.widths.values())
    for shard in part.shards:
        if (part.folder / shard.file).stat().st_size < shard.rows * width * size:
            says = f"{shard.rows} rows of {width} numbers"
            raise StoreError(f"{part.folder / MANIFEST} says {says}, more than {shard.file} holds; remove it")


def _read_rows(part: Pass) -> Rows:
    columns: list[list[np.ndarray]] = [[] for _ in Rows._fields]
    for shard in part.shards:
        with _opened(part, shard) as file:
            for column, name in zip(columns, Rows._fields, strict=True):
                data = _array(file, f"rows/{name}", (shard.rows,), *INTEGERS)
                column.append(data[:].astype(np.int64))
    return Rows(*(torch.from_numpy(np.concatenate(column)) for column in columns))
