"""Write activations to the shards of a store as they are computed.

1. A shard is written under a temporary name of this process's own, flushed to disk, hashed and renamed. A
   record beside it, written last, says that it is complete and which batches it holds.
2. One thread writes batches in order and another completes shards, while the device computes what comes next;
   at most `AHEAD` batches wait. After a failure neither does anything more.
3. A shard with a matching record and checksum is never computed again; anything else is.
4. The manifest that makes the pass exist is written once all shards are there, by one process.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import h5py
import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from mechdiff.data.manifest import MANIFEST, SCHEMA, Pass, Shard, checksum, read_json, unwritable, write_json
from mechdiff.data.store import encode
from mechdiff.errors import StoreError
from mechdiff.extraction.plan import Batch, PlannedShard
from mechdiff.extraction.spec import COLUMNS, KINDS, size
from mechdiff.files import PART
from mechdiff.interventions.sites import Site

AHEAD = 2
"""Batches that may wait to be written; each holds its rows in memory."""
Prediction = Callable[[], Mapping[Site, Tensor]]
"""Waits for the rows of a batch and returns them by site, `(rows, width)` on the CPU."""


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
        self._closed: Path | None = None  # the file that is being completed
        self._threads: list[ThreadPoolExecutor] = []
        self._waiting: deque[Future[None]] = deque()
        self._completing: Future[None] | None = None
        self._failed = False

    def missing(self) -> list[PlannedShard]:
        """Return the shards that have yet to be written."""
        return [shard for shard in self.shards if self._committed(shard) is None]

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the threads."""
        self._threads = [ThreadPoolExecutor(1, "batches"), ThreadPoolExecutor(1, "shards")]

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Prediction,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Have one batch written, and the shard completed if it was the last of it."""
        while len(self._waiting) >= AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._threads[0].submit(self._write, prediction, batch))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for what is being written."""
        while self._waiting:
            self._waiting.popleft().result()
        self._wait_for_shard()
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove what is half written."""
        self._failed = True
        self._stop()
        self._waiting.clear()
        file, self._file = self._file, None
        with suppress(OSError):  # the folder may be what has gone
            if self._closed is not None:
                self._closed.unlink(missing_ok=True)
            if file is not None:
                Path(file.filename).unlink(missing_ok=True)
        if file is not None:
            with suppress(OSError, RuntimeError):  # what could not be written cannot be flushed either
                file.close()

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
        try:
            for path in self.folder.iterdir():  # left by a plan with other batches
                if path.name not in used:
                    path.unlink()
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _begin(self, shard: PlannedShard, prediction: Mapping[Site, Tensor]) -> None:
        assert self._file is None, "the last shard was not completed"
        self._file = h5py.File(self.folder / f".{shard.file}.{os.getpid()}{PART}", "w")
        self._file.attrs["dtype"] = self.dtype
        for name, dtype in COLUMNS.items():
            self._file.create_dataset(f"rows/{name}", (shard.rows,), dtype)
        for site, values in prediction.items():
            self._file.create_dataset(f"sites/{site}", (shard.rows, values.shape[1]), KINDS[self.dtype])
        if hasattr(os, "posix_fallocate"):  # HDF5 does not survive a file that it cannot finish
            room = size(shard, sum(values.shape[1] for values in prediction.values()), self.dtype)
            os.posix_fallocate(self._file.id.get_vfd_handle(), 0, room)

    def _write(self, prediction: Prediction, batch: Batch) -> None:
        """Write one batch; after a batch that failed the shard has a hole, and must not be completed."""
        if self._failed:
            return
        try:
            rows = prediction()
            shard, end = self.shards[batch.shard], batch.start + batch.where.shape[0]
            if batch.start == 0:
                self._begin(shard, rows)
            assert self._file is not None, "a shard is written from its first batch on"
            for name, column in batch.rows._asdict().items():
                self._file[f"rows/{name}"][batch.start : end] = column.numpy()
            for site, values in rows.items():
                self._file[f"sites/{site}"][batch.start : end] = encode(values, self.dtype)
            if end == shard.rows:
                self._wait_for_shard()
                self._closed = Path(self._file.filename)
                self._file.flush()
                length = self._file.id.get_filesize()
                self._file.close()
                self._file = None
                os.truncate(self._closed, length)  # the rest was reserved
                self._completing = self._threads[1].submit(self._commit, shard, self._closed)
        except BaseException as error:
            self._failed = True
            if isinstance(error, OSError):
                raise unwritable(self.folder, error) from error
            raise

    def _commit(self, shard: PlannedShard, part: Path) -> None:
        path = self.folder / shard.file
        try:
            with part.open("rb") as file:
                os.fsync(file.fileno())
            done = Shard(shard.file, shard.rows, checksum(part))
            os.replace(part, path)
            body = {"schema": SCHEMA, "key": self.key, "batches": shard.digest, **asdict(done)}
            write_json(self.folder / _record(shard), body)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _wait_for_shard(self) -> None:
        if self._completing is not None:
            self._completing.result()
            self._completing = self._closed = None

    def _stop(self) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        self._threads.clear()

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
