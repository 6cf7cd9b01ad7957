"""Extract, and print the number of rows and the largest resident memory in KiB; a process for each size."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from benchmarks.corpus import corpus
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.interventions.sites import Site
from mechdiff.pairs.loading import load_pair
from mechdiff.study import read_pair

PROCESS = Path("/proc/self")


def main(pair: str, room: str, count: str, repeat: str) -> None:
    """Extract the first two layers: memory does not depend on how many blocks are run."""
    base = load_pair(read_pair(Path(pair)), torch.device("cpu")).base
    texts = corpus(int(count), int(repeat))
    sites = [Site(layer) for layer in range(2)]
    (PROCESS / "clear_refs").write_text("5")  # the peak of loading does not count
    store = ensure_store(
        base, texts, sites, ExtractionSpec(room), trainer_kwargs={"enable_progress_bar": False}
    )
    peak = re.search(r"VmHWM:\s+(\d+)", (PROCESS / "status").read_text())
    assert peak is not None
    print(len(store), peak[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
