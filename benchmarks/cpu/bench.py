"""What all measurements share: the pair, the room, the ceilings of the machine, and how a row is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock, results
from benchmarks.cpu.arithmetic import Cost
from benchmarks.peer import NotMeasured, Peer
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.interventions.sites import Site
from mechdiff.pairs.loading import LoadedModel, LoadedPair, load_pair
from mechdiff.pairs.sources import model_folder
from mechdiff.study import read_pair

WHO = "cpu"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        texts: Texts that are extracted beside other tools.
        pair_texts: Texts that both models of the pair read, for what is done with their stores.
        few: Texts on which the slowest peer is measured.
        rounds: Turns of what is fast.
        slow: Turns of what is slow.
        sites: Layers that are extracted.
        prompts: Prompts of a sweep over all positions, and over the last one.
        length: Their tokens.
        items: Multiple-choice questions.
        batch: Rows of a training batch.
        matmul: Rows and columns of the product that is the ceiling.
        copied: Bytes of the copy that is the ceiling.
        starts: Starts of the command line.
    """

    texts: int
    pair_texts: int
    few: int
    rounds: int
    slow: int
    sites: int
    prompts: tuple[int, int]
    length: int
    items: int
    batch: int
    matmul: int
    copied: int
    starts: int


FULL = Size(112, 256, 6, 4, 2, 12, (8, 8), 40, 40, 4096, 2048, 1 << 28, 5)
TINY = Size(12, 12, 2, 2, 1, 2, (2, 2), 8, 4, 64, 128, 1 << 20, 1)


class Bench:
    """The pair, and the rows that were measured on it.

    Args:
        pair: File of the pair.
        out: Folder of the results.
        work: Room for stores.
        peers: Interpreter of the environment of other tools.
        size: How much is run.
    """

    def __init__(self, pair: Path, out: Path, work: Path, peers: Path, size: Size) -> None:
        self.file, self.out, self.work, self.peers, self.size = pair, out, work, peers, size
        self.lines: list[dict[str, Any]] = []
        self.rates: dict[str, float] = {}

    @cached_property
    def pair(self) -> LoadedPair:
        """The two models."""
        return load_pair(read_pair(self.file), CPU)

    @property
    def base(self) -> LoadedModel:
        """The one that most is measured on."""
        return self.pair.base

    @cached_property
    def folder(self) -> str:
        """Where base lies, for other tools."""
        return str(model_folder(self.pair.spec.base, "pair.base.id"))

    @cached_property
    def cost(self) -> Cost:
        """What its forward pass costs."""
        return Cost(self.base)

    @cached_property
    def sites(self) -> list[Site]:
        """Every other layer from the first."""
        return [Site(layer) for layer in range(0, self.base.depth, 2)][: self.size.sites]

    def spec(self, name: str) -> ExtractionSpec:
        """Say where and how a store is made: as by default, but in this room."""
        return ExtractionSpec(str(self.work / name))

    def ceilings(self) -> None:
        """Measure what there is to be had."""
        size = self.size
        self.rates = {
            "matmul": clock.matmul_rate(CPU, torch.float32, size.matmul),
            "matmul_float64": clock.matmul_rate(CPU, torch.float64, size.matmul),
            "copy": clock.copy_rate(CPU, size.copied),
            "disk": clock.disk_rate(self.work, 2 * max(size.copied, 1 << 24)),
        }
        figures = {
            "float32_matmul_gflop_per_s": self.rates["matmul"] / 1e9,
            "float64_matmul_gflop_per_s": self.rates["matmul_float64"] / 1e9,
            "copy_gb_per_s": self.rates["copy"] / 1e9,
            "disk_write_gb_per_s": self.rates["disk"] / 1e9,
            "threads": torch.get_num_threads(),
        }
        self.keep("ceilings", figures)

    @property
    def rate(self) -> float:
        """Operations a second of a matrix product in float32."""
        if not self.rates:
            self.rates = {"matmul": clock.matmul_rate(CPU, torch.float32, self.size.matmul)}
        return self.rates["matmul"]

    def keep(
        self, what: str, figures: Mapping[str, Any], limit: str = "", **ratios: Mapping[str, Any]
    ) -> None:
        """Keep a row, on disk at once, and say whether its goal is met.

        Args:
            what: Which row.
            figures: Numbers, how far the results agree among them.
            limit: What stands in the way of more.
            **ratios: What they come to.
        """
        line = results.measurement(WHO, what, figures, **ratios) | {"limit": limit}
        self.lines.append(line)
        results.append([line], self.out / "results.jsonl")
        self.say(f"{what}: {'; '.join(results.figures(line))}")
        for name, ratio in ratios.items():
            self.say(f"    {name} {results.said(ratio)}")
            if results.met(ratio) is False and limit:
                self.say(f"    {limit}")

    def missing(self, what: str, reason: object) -> None:
        """Keep that a peer could not be measured."""
        self.keep(what, {"not_measured": " ".join(str(reason).split())})

    def beside(self, what: str, name: str, job: dict[str, Any], use: Callable[[Peer], None]) -> None:
        """Do something with a worker, or keep that it could not be measured."""
        try:
            with Peer(name, job, self.work, self.peers) as peer:
                use(peer)
        except NotMeasured as reason:
            self.missing(what, reason)

    def say(self, text: str) -> None:
        """Print with the time."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
