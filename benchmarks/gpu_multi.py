"""Extraction on several GPUs: `python -m benchmarks.gpu_multi --out FOLDER [--tiny] [--parts ...]`.

Everything is run as a user would, by the command line.

1. `speed`: one pair of 8B models, the same texts, by 1, 2 and 4 processes as there are GPUs. Tokens a second
   are those that the command reports. The stores of any number of processes must be the same.
2. `kill`: one of two processes is killed half way; the same command again must give the store of one process.
3. `nodes`: `torchrun --nnodes 2` on one host gives it too.
4. `split`: and so does a model spread over two GPUs.
5. `descent`: two processes that train give the map and the subspace that one gives.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.shapes import ROOT, write_pair
from mechdiff.data.manifest import MANIFEST
from mechdiff.data.store import ActivationStore

PARTS = ("speed", "kill", "nodes", "split", "descent")
SAID = re.compile(r"^(base|tuned): (\d+) tokens in ([\d.]+) s by (\d+), \d+ tokens/s; .* had ([\d.]+)%", re.M)
PATIENCE = 300.0  # seconds


@dataclass(frozen=True)
class Size:
    """How much is run: shapes of the fast and of the checked pair, their tokens, longest text and sites."""

    fast: str
    checked: str
    dtype: str
    tokens: int
    few: int
    longest: int
    per_batch: int
    fast_layers: str
    layers: str


FULL = Size("8b", "wide", "bfloat16", 400_000, 150_000, 512, 8192, "[15,31]", "[1,3]")
TINY = Size("tiny", "tiny", "float32", 6_000, 6_000, 64, 256, "[1,3]", "[1,3]")


class Bench:
    """Runs commands on one pair, and keeps what they say."""

    def __init__(self, work: Path, out: Path, accelerator: str, size: Size) -> None:
        self.work, self.out, self.accelerator, self.size = work, out, accelerator, size
        self.lines: list[dict[str, Any]] = []
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if accelerator == "cpu":
            self.environment["OMP_NUM_THREADS"] = "1"

    def pair(self, kind: str) -> Path:
        """Write the `fast` or the `checked` pair, once."""
        folder = self.work / kind
        if not (folder / "pair.yaml").exists():
            folder.mkdir(parents=True)
            begun = time.perf_counter()
            tokens = self.size.tokens if kind == "fast" else self.size.few
            device = "cuda" if self.accelerator == "gpu" else "cpu"
            write_pair(folder, getattr(self.size, kind), device, self.size.dtype, tokens, self.size.longest)
            if device == "cuda":
                torch.cuda.empty_cache()
            self.say(f"wrote the {kind} pair in {time.perf_counter() - begun:.1f} s")
        return folder / "pair.yaml"

    def command(self, kind: str, name: str, *more: str) -> list[str]:
        """Return `mechdiff extract` for a pair, into stores of its own."""
        layers = self.size.fast_layers if kind == "fast" else self.size.layers
        return [
            *("-m", "mechdiff", "extract", "--config", str(ROOT / "configs" / "clt_cultural_sgd.yaml")),
            *("--pair", str(self.pair(kind)), f"--layers={layers}", "--data.tokens=null"),
            f"--extraction.root={self.work / 'stores' / name}",
            *("--extraction.dtype=bfloat16", f"--extraction.tokens_per_batch={self.size.per_batch}"),
            *("--extraction.batches_per_shard=1", "--trainer.enable_progress_bar=false"),
            *(f"--trainer.accelerator={self.accelerator}", *more),
        ]

    def start(self, command: list[str], log: str, **environment: str) -> subprocess.Popen:
        """Start a command in a session of its own, its output going to a file."""
        with (self.out / f"{log}.log").open("w") as file:
            return subprocess.Popen(
                [sys.executable, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment | environment,
                start_new_session=True,
            )

    def finish(self, process: subprocess.Popen, log: str, *, good: bool = True) -> str:
        """Wait for a command, not as long if it is expected to fail, and return what it said."""
        try:
            code = process.wait(PATIENCE if good else PATIENCE / 5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it
            code = process.wait()
        said = (self.out / f"{log}.log").read_text()
        if good and code:
            raise RuntimeError(f"{log} ended with {code}:\n{said[-3000:]}")
        return said

    def extract(self, kind: str, name: str, *more: str) -> str:
        """Run an extraction to its end."""
        begun = time.perf_counter()
        said = self.finish(self.start(self.command(kind, name, *more), name), name)
        self.say(f"{name}: {time.perf_counter() - begun:.1f} s in all")
        return said

    def digests(self, name: str) -> dict[str, Any]:
        """Return the rows and checksums of every shard of the stores of a run."""
        found = sorted((self.work / "stores" / name).glob(f"*/pass-*/{MANIFEST}"))
        return {
            str(path.relative_to(self.work / "stores" / name)): json.loads(path.read_text()) for path in found
        }

    def compare(self, one: str, other: str) -> dict[str, Any]:
        """Compare the stores of two runs: bit for bit, else row by row and value by value."""
        a, b = self.digests(one), self.digests(other)
        assert a, f"{one} left no store"
        if a == b:
            return {"same_rows": True, "same_bits": True, "largest_relative_difference": 0.0}
        same, worst = True, 0.0
        for key in sorted({name.split("/")[0] for name in a}):
            first, second = (ActivationStore.open(self.work / "stores" / run / key) for run in (one, other))
            same &= all(torch.equal(x, y) for x, y in zip(first.rows, second.rows, strict=True))
            for site in first.sites:
                for x, y in zip(first.blocks(site), second.blocks(site), strict=True):
                    worst = max(worst, float((x - y).norm() / x.norm()))
        return {"same_rows": same, "same_bits": False, "largest_relative_difference": worst}

    def keep(self, what: str, figures: dict[str, Any], **ratios: dict[str, Any]) -> None:
        """Keep a measurement, on disk at once."""
        line = results.measurement("gpu_multi", what, figures, **ratios)
        self.lines.append(line)
        results.append([line], self.out / "results.jsonl")
        self.say(f"{what}: {figures} {ratios}")

    def say(self, text: str) -> None:
        """Print with the time."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    # --- parts ---------------------------------------------------------------------------------------------

    def speed(self, counts: list[int]) -> None:
        """Measure tokens per second by number of processes, on the same texts."""
        rates: dict[int, dict[str, float]] = {}
        for count in counts:
            said = self.extract("fast", f"speed-{count}", *several(count))
            found = SAID.findall(said)
            assert [role for role, *_ in found] == ["base", "tuned"], said[-2000:]
            assert all(int(by) == count for *_, by, _ in found)
            rates[count] = {role: int(tokens) / float(seconds) for role, tokens, seconds, *_ in found}
            figures: dict[str, Any] = {f"{role}_tokens_per_s": rate for role, rate in rates[count].items()}
            figures |= {"tokens": int(found[0][1]), "busiest_over_mean_percent": float(found[1][4])}
            ratios = {}
            if count > 1:
                figures |= self.compare("speed-1", f"speed-{count}")
                goal = {2: 0.95, 4: 0.9}.get(count)
                ratios = {
                    f"efficiency_{role}": {"value": rates[count][role] / count / rates[1][role], "goal": goal}
                    for role in ("base", "tuned")
                }
                shutil.rmtree(self.work / "stores" / f"speed-{count}")
            self.keep(f"extract {self.size.fast} by {count}", figures, **ratios)
        shutil.rmtree(self.work / "stores" / "speed-1")

    def reference(self) -> str:
        """Extract the checked pair by one process, once."""
        if not (self.work / "stores" / "one").exists():
            self.extract("checked", "one", *several(1))
        return "one"

    def kill(self) -> None:
        """Kill one of two processes after its first shards, and run the command again."""
        reference, command = self.reference(), self.command("checked", "killed", *several(2))
        process = self.start(command, "killed")
        victim = self.second_process(process)
        shards = wait_for(lambda: list((self.work / "stores" / "killed").rglob("shard-*.json")), process)
        os.kill(victim, signal.SIGKILL)
        self.finish(process, "killed", good=False)
        assert process.returncode != 0, "the run ended before it could be killed"
        left = len(list((self.work / "stores" / "killed").rglob("shard-*.json")))
        planned = sum(len(body["shards"]) for body in self.digests(reference).values())
        self.extract("checked", "killed", *several(2))
        counts = {"shards_at_the_kill": len(shards), "shards_kept": left, "shards": planned}
        self.keep("one of 2 processes killed, resumed", counts | self.compare(reference, "killed"))

    def second_process(self, process: subprocess.Popen) -> int:
        """Find the process of rank 1, a child of rank 0."""

        def children() -> list[int]:
            found = []
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    parent = int(re.search(r"^PPid:\s+(\d+)", status.read_text(), re.M)[1])  # type: ignore[index]
                    environment = (status.parent / "environ").read_bytes()
                except OSError:  # it is gone
                    continue
                if parent == process.pid and b"LOCAL_RANK=1\0" in environment:
                    found.append(int(status.parent.name))
            return found

        return wait_for(children, process)[0]

    def nodes(self) -> None:
        """Let torchrun start two nodes of one process each, both on this machine."""
        reference, port = self.reference(), str(29500 + os.getpid() % 500)
        more = ("--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy=ddp")
        launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        launch += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        command = self.command("checked", "nodes", *more)
        started = [
            self.start([*launch, f"--node-rank={n}", *command], f"node-{n}", CUDA_VISIBLE_DEVICES=str(n))
            for n in range(2)
        ]
        said = [self.finish(process, f"node-{n}") for n, process in enumerate(started)]
        processes = {int(by) for *_, by, _ in SAID.findall(said[0])}
        assert processes == {2}, said[0][-2000:]
        self.keep("torchrun, 2 nodes on one host", self.compare(reference, "nodes"))

    def split(self) -> None:
        """Spread each model over two GPUs."""
        reference = self.reference()
        self.extract("checked", "split", "--trainer.devices=[0]", "--pair.cards=2")
        self.keep("a model over 2 GPUs", self.compare(reference, "split"))

    def descent(self) -> None:
        """Fit a map and a subspace by one and by two processes."""
        for kind in ("clt", "steering"):
            folder = self.work / f"descent-{kind}"
            for count in (1, 2):
                job = ["-m", "tests.modules.descent_job", kind, str(folder), str(count), self.accelerator]
                name = f"{kind}-{count}"
                self.finish(self.start(job, name), name)
            one, two = (
                torch.load(folder / f"{kind}-{n}.pt", weights_only=True, map_location="cpu")["state"]
                for n in (1, 2)
            )
            worst = 0.0
            for name, value in one.items():
                mapped = kind == "clt" and name in (
                    "weight",
                    "bias",
                )  # beside it: a control, shuffled per process
                a, b = (value[0], two[name][0]) if mapped else (value, two[name])
                worst = max(worst, float((a - b).double().norm() / a.double().norm().clamp_min(1e-12)))
            self.keep(f"{kind} by descent, 2 processes against 1", {"largest_relative_difference": worst})


def several(count: int) -> tuple[str, ...]:
    """Return the options of a trainer with so many processes."""
    return (f"--trainer.devices={count}", f"--trainer.strategy={'ddp' if count > 1 else 'auto'}")


def wait_for(look: Callable[[], list], process: subprocess.Popen) -> list:
    """Wait until something is there."""
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the run ended before it could be killed")
        time.sleep(0.002)
    return found


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the parts that are asked for and return what they measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir(), "mechdiff-gpu-multi"),
        help="room for models and stores",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processes", type=int, nargs="+", help="numbers of processes to compare, 1 first")
    parser.add_argument("--tokens", type=int, help="tokens of the fast pair")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    given = parser.parse_args(args)
    there = torch.cuda.device_count()
    if not given.tiny and there < 2:
        parser.error(f"{there} GPUs are there; at least 2 are needed, or --tiny")
    size = TINY if given.tiny else FULL
    if given.tokens:
        size = Size(**{**vars(size), "tokens": given.tokens})
    given.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(given.work, ignore_errors=True)
    bench = Bench(given.work, given.out, "cpu" if given.tiny else "gpu", size)
    counts = given.processes or ([1, 2] if given.tiny else [n for n in (1, 2, 4) if n <= there])
    calls = {part: getattr(bench, part) for part in given.parts} | {"speed": lambda: bench.speed(counts)}
    wanted = {part: calls[part] for part in given.parts if part != "split" or not given.tiny}
    failed = results.run_parts(wanted, bench.say)
    shutil.rmtree(given.work, ignore_errors=True)
    table = results.tables(bench.lines)
    (given.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return bench.lines


if __name__ == "__main__":
    main()
