"""Write activations to the shards of a store as they are computed.

1. A shard is written under a temporary name, flushed to disk, hashed and renamed. A record beside it, written
   last, says that it is complete and which batches it holds.
2. A shard with a matching record and checksum is never computed again; anything else is.
3. The manifest that makes the pass exist is written once all shards are there, by one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from mechdiff.data.manifest import MANIFEST, SCHEMA, Pass, Shard, checksum, read_json, write_json
from mechdiff.data.store import encode
from mechdiff.errors import StoreError
from mechdiff.extraction.plan import Batch, PlannedShard
from mechdiff.interventions.sites import Site

COLUMNS = {"example": np.int32, "region": np.int8, "offset": np.int32, "position": np.int32}


class ActivationWriter(BasePredictionWriter):
    """Write the predictions of an `Extractor`, batch by batch, into the shards of a pass.

    Args:
        folder: The folder of the pass.
        shards: All shards of the pass.
        key: Key of the store.
        dtype: Type on disk.
    """

    def __init__(self, folder: Path, shards: Sequence[PlannedShard], key: str, dtype: str) -> None:
        super().__init__("batch")
        self.folder, self.shards, self.key, self.dtype = folder, shards, key, dtype
        self._file: h5py.File | None = None

    def missing(self, rank: int = 0, world_size: int = 1) -> list[PlannedShard]:
        """Return the shards that one of several processes has yet to write."""
        return [shard for shard in self.shards[rank::world_size] if self._committed(shard) is None]

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Mapping[Site, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch; complete the shard if it was the last of it."""
        shard, end = self.shards[batch.shard], batch.start + batch.where.shape[0]
        if batch.start == 0:
            self._begin(shard, prediction)
        assert self._file is not None, "a shard is written from its first batch on"
        for name, column in batch.rows._asdict().items():
            self._file[f"rows/{name}"][batch.start : end] = column.cpu().numpy()
        for site, values in prediction.items():
            self._file[f"sites/{site}"][batch.start : end] = encode(values, self.dtype)
        if end == shard.rows:
            self._commit(shard)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove what is half written."""
        if self._file is not None:
            path = Path(self._file.filename)
            self._file.close()
            self._file = None
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Make the pass exist; to be called by one process, after all have written.

        Raises:
            StoreError: If a shard is missing.
        """
        found = [self._committed(shard) for shard in self.shards]
        missing = [planned.file for planned, shard in zip(self.shards, found, strict=True) if shard is None]
        if missing:
            raise StoreError(f"{self.folder / missing[0]} was not written; run the same command to resume")
        shards = [shard for shard in found if shard is not None]
        with h5py.File(self.folder / shards[0].file, "r") as file:
            widths = {Site.parse(name): int(data.shape[1]) for name, data in file["sites"].items()}
        Pass(self.folder, widths, shards).write(self.key)
        used = {name for shard in self.shards for name in (shard.file, _record(shard).name)} | {MANIFEST}
        for path in self.folder.iterdir():  # left by a plan with other batches
            if path.name not in used:
                path.unlink()

    def _begin(self, shard: PlannedShard, prediction: Mapping[Site, Tensor]) -> None:
        assert self._file is None, "the last shard was not completed"
        self._file = h5py.File(self.folder / f".{shard.file}.part", "w")
        self._file.attrs["dtype"] = self.dtype
        for name, dtype in COLUMNS.items():
            self._file.create_dataset(f"rows/{name}", (shard.rows,), dtype)
        for site, values in prediction.items():
            kind = np.uint16 if self.dtype == "bfloat16" else np.float32
            self._file.create_dataset(f"sites/{site}", (shard.rows, values.shape[1]), kind)

    def _commit(self, shard: PlannedShard) -> None:
        assert self._file is not None
        part, path = Path(self._file.filename), self.folder / shard.file
        self._file.close()
        self._file = None
        with part.open("rb") as file:
            os.fsync(file.fileno())
        done = Shard(shard.file, shard.rows, checksum(part))
        os.replace(part, path)
        body = {"schema": SCHEMA, "key": self.key, "batches": shard.digest, **asdict(done)}
        write_json(self.folder / _record(shard), body)

    def _committed(self, shard: PlannedShard) -> Shard | None:
        """Return a shard as it was committed, or None if it has to be written."""
        try:
            body = read_json(self.folder / _record(shard))
            if (body["key"], body["batches"]) != (self.key, shard.digest):
                return None
            done = Shard(body["file"], body["rows"], body["xxh3"])
        except (StoreError, KeyError):  # no record, or none that can be trusted
            return None
        return done if done.intact(self.folder) else None


def _record(shard: PlannedShard) -> Path:
    return Path(shard.file).with_suffix(".json")
