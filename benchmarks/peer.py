"""Drive another tool in an environment of its own, one turn at a time.

The worker (`benchmarks.peers`) gets ready, then waits: while it waits it takes no processor time. What it is
to do lies in a file, and what it found in another.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.shapes import ROOT
from benchmarks.turns import Turn

LAST_LINES = 3


class NotMeasured(Exception):
    """A peer that is not installed, or does not run."""


class Peer:
    """A worker.

    Args:
        name: One of `benchmarks.peers.WAYS`.
        job: What it is to do: tensors, numbers and texts.
        folder: Room for its files.
        python: Interpreter of its environment.

    Raises:
        NotMeasured: If it cannot get ready.
    """

    def __init__(self, name: str, job: dict[str, Any], folder: Path, python: Path) -> None:
        self.name, self.folder = name, folder / f"peer-{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(job, self.folder / "job.pt")
        command = [str(python), "-m", "benchmarks.peers", name, str(self.folder)]
        if not python.exists():
            raise NotMeasured(f"{python} is not there; make bench makes it")
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            )
        try:
            about = self._answer()
            self.version = f"{name} {about['version']}"
            assert about["threads"] == torch.get_num_threads(), about
            if about["torch"] != torch.__version__:
                raise NotMeasured(f"{name} runs torch {about['torch']}, not {torch.__version__}")
        except BaseException:
            self.close()
            raise

    def turn(self) -> Turn:
        """Do the whole work once."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return Turn(**self._answer())

    @property
    def result(self) -> Any:
        """What the last turn found."""
        return torch.load(self.folder / "result.pt", weights_only=True)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = (self.folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise NotMeasured(f"{self.name}: {' | '.join(said[-LAST_LINES:])[-400:]}")
        return dict(json.loads(line))
