"""Run work in processes that are killed without warning, and count what that breaks.

A process is a fork of this one, which has imported everything already: a trial costs what its work costs.
This one must therefore never compute in several threads, which a fork does not have.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

Run = Callable[[Path], int]
PATIENCE = 1800.0
"""Seconds after which a process that was left alone counts as hung."""


@dataclass(frozen=True)
class Work:
    """Something that a user runs, and what it leaves in a folder.

    Attributes:
        name: Its name.
        run: Does it, or goes on with it, in a folder; returns the exit code.
        committed: What is promised to be kept, by name: whatever identifies its content.
        unreadable: What lies there under its final name and cannot be read.
        outcome: What has to equal that of an uninterrupted run.
        duplicates: How often something occurs twice.
        ranks: Number of processes that share it.
    """

    name: str
    run: Run
    committed: Callable[[Path], dict[str, object]]
    unreadable: Callable[[Path], list[str]]
    outcome: Callable[[Path], object]
    duplicates: Callable[[Path], int]
    ranks: int = 1


@dataclass
class Count:
    """What was counted.

    Attributes:
        kills: Processes that were killed while they ran.
        finished: Runs that were finished after kills, and compared.
        unreadable: Files that could not be read after a kill.
        lost: Things that were committed before a kill and not after it.
        duplicates: Things that occurred twice in the end.
        different: Finished runs that differ from the uninterrupted one.
        failed: Runs that were not killed and failed.
        seconds: How long it all took.
    """

    kills: int = 0
    finished: int = 0
    unreadable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    duplicates: int = 0
    different: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.unreadable or self.lost or self.duplicates or self.different or self.failed)


class Processes:
    """The processes of one run.

    Args:
        run: What they do.
        folder: Where.
        ranks: How many.
        log: File that receives what they print.
    """

    def __init__(self, run: Run, folder: Path, ranks: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.codes: dict[int, int | None] = {}
        for rank in range(ranks):
            given = {"LOCAL_RANK": rank, "WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in given.items()} if ranks > 1 else {}
            self.codes[_fork(run, folder, rank, environment, log)] = None

    def running(self) -> list[int]:
        """Return those that have not ended."""
        for pid, code in self.codes.items():
            if code is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid, code in self.codes.items() if code is None]

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended; tell whether they have."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def kill(self, pids: list[int]) -> None:
        """Kill some of them."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.codes[pid] = -signal.SIGKILL


def torture(
    work: Work,
    place: Path,
    kills: int,
    seed: int,
    tell: Callable[[Count], None] = lambda count: None,
    patience: float = PATIENCE,
) -> Count:
    """Kill a work at random moments, run it again until it is finished, and compare; over and over.

    Args:
        work: What to run.
        place: An empty folder.
        kills: Number of kills.
        seed: Seed of the moments; which instruction they hit is up to the machine.
        tell: Hears what was counted so far, after every finished run.
        patience: Seconds after which a process that was left alone counts as hung.
    """
    draws, count, began = random.Random(seed), Count(), time.monotonic()
    log = place / "log.txt"
    whole = _folder(place / "whole")
    start = time.monotonic()
    processes = Processes(work.run, whole, work.ranks, log)
    assert processes.wait(patience), log.read_text()
    assert not any(processes.codes.values()), log.read_text()
    length, wanted = time.monotonic() - start, work.outcome(whole)
    number = 0
    while count.kills < kills:
        number += 1
        folder = _folder(place / str(number))
        more = draws.randint(1, 4)
        orphans: list[Processes] = []
        while more and count.kills < kills:
            before = work.committed(folder)
            anew, start = not any(folder.iterdir()), time.monotonic()
            processes = Processes(work.run, folder, work.ranks, log)
            processes.wait(draws.uniform(0, length))
            alive = processes.running()
            if not alive:
                length = time.monotonic() - start if anew else length  # the machine has less to do by now
                break
            chosen = draws.sample(alive, draws.randint(1, len(alive)))
            processes.kill(chosen)
            count.kills += len(chosen)
            first = [pid for pid in processes.running() if pid == next(iter(processes.codes))]
            processes.wait(draws.uniform(0, 0.5))
            processes.kill([pid for pid in first if pid in processes.running()])
            orphans.append(processes)  # others, of which nobody has told anyone, go on beside the next run
            more -= 1
            after = work.committed(folder)
            count.lost += [name for name, content in before.items() if after.get(name) != content]
            count.unreadable += work.unreadable(folder)
        start = time.monotonic()
        processes = Processes(work.run, folder, work.ranks, log)
        ended = processes.wait(patience)
        length = max(length, time.monotonic() - start)  # or more
        for left in (*orphans, processes):
            left.kill(left.running())
        if not ended or any(processes.codes.values()):
            count.failed.append(f"{work.name} {number}: {processes.codes}: {log.read_text()[-2000:]}")
            continue
        count.finished += 1
        count.unreadable += work.unreadable(folder)
        count.duplicates += work.duplicates(folder)
        count.different += work.outcome(folder) != wanted
        shutil.rmtree(folder)
        count.seconds = time.monotonic() - began
        tell(count)
    return count


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _fork(run: Run, folder: Path, rank: int, environment: dict[str, str], log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        rank_zero_only.rank = rank  # read from the environment when it was imported
        code = run(folder)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
