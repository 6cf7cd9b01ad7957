"""Feed mutated files to the readers, guided by coverage: `python -m tests.fuzz [--seconds N] [TARGET ...]`.

Each target runs in a process of its own, which ends at the first input that is neither read nor refused in
one line; the input is kept. The exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mechdiff"]):
    from tests.fuzz.targets import TARGETS, right, written


def main() -> int:
    """Run the targets one after the other; print the number of inputs of each."""
    parser = argparse.ArgumentParser("tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="of each target; default: 60")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-findings"), help="folder for what was found")
    given = parser.parse_args()
    found = 0
    for name in given.targets or TARGETS:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--one",
            name,
            str(given.seconds),
            f"{given.kept / name}-",
        ]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        runs = re.findall(r"^(?:#|Done )(\d+)", done.stderr, re.M)
        print(f"{name}: {runs[-1] if runs else 0} inputs, {int(done.returncode != 0)} failures", flush=True)
        if done.returncode:
            found += 1
            print(done.stderr[-3000:], flush=True)
    return int(found > 0)


def one(name: str, seconds: str, kept: str) -> None:
    """Run one target in this process, from what it accepts."""
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "right").write_bytes(written(name, right(name)))
        options = [
            f"-max_total_time={seconds}",
            f"-artifact_prefix={kept}",
            "-max_len=8192",
            "-rss_limit_mb=0",
        ]
        Path(kept).parent.mkdir(parents=True, exist_ok=True)

        def feed(data: bytes) -> None:
            TARGETS[name](data)

        atheris.Setup([sys.argv[0], corpus, *options], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:5])
    else:
        sys.exit(main())
