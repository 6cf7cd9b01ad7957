"""Time what a device does."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

MATMUL, COPY = 8192, 1 << 30  # rows and columns; bytes


class Timed(NamedTuple):
    """Median seconds of some calls, and the most memory that they took on the device, in GiB."""

    seconds: float
    peak_gib: float


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 5, warm_up: int = 1) -> Timed:
    """Time a call by events of the device, by the clock on a CPU."""
    for _ in range(warm_up):
        call()
    seconds = []
    if device.type != "cuda":
        for _ in range(repeats):
            begun = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun)
        return Timed(statistics.median(seconds), 0.0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return Timed(statistics.median(seconds), torch.cuda.max_memory_allocated(device) / 2**30)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = MATMUL) -> float:
    """Return the rate of a square matrix product on random data, in floating-point operations a second."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / timed(lambda: torch.mm(a, b, out=out), device, 20, 5).seconds


def copy_rate(device: torch.device, size: int = COPY) -> float:
    """Return the rate of a copy within a device, bytes read plus bytes written a second."""
    source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device, 10, 3).seconds


def to_host_rate(device: torch.device, size: int = COPY) -> float:
    """Return the rate of a copy from a device to pinned memory, bytes a second."""
    source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return size / timed(lambda: target.copy_(source, non_blocking=True), device, 5, 2).seconds


def disk_rate(folder: Path, size: int = COPY) -> float:
    """Return the rate at which one thread writes a file down to the disk, bytes a second."""
    block, path = os.urandom(1 << 24), folder / "disk"
    begun = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return size // len(block) * len(block) / seconds


class Clock(L.Callback):
    """Counts the rows that a prediction keeps, and the seconds, from its `skip`-th batch to its very end.

    With all positions kept they are the tokens that are run: neither counts what all texts begin with.
    """

    def __init__(self, skip: int = 2) -> None:
        self.skip, self.tokens, self.seconds, self.peak_gib = skip, 0, 0.0, 0.0
        self._begun = 0.0

    def on_predict_batch_start(
        self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Begin with the first batch that is not skipped."""
        if batch_idx == self.skip:
            if module.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self._begun = time.perf_counter()
        if batch_idx >= self.skip:
            self.tokens += len(batch.where)

    def on_predict_end(self, trainer: L.Trainer, module: Any) -> None:
        """End when the rows are where the writer, which comes before, has put them."""
        if module.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        self.seconds = time.perf_counter() - self._begun

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds
