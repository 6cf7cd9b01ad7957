"""One extraction, as a script: `python -m tests.extraction.job ROOT DEVICES [BATCHES [SHARD]]`.

With a number of batches it kills itself, without warning, after as many. A shard is lost afterwards, and the
same processes extract again.
"""

from __future__ import annotations

import os
import signal
import sys

import lightning as L
import torch

from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.lock import first
from mechdiff.extraction.spec import ExtractionSpec
from tests.toys import loaded, prompts

SITES = ["resid_post.1", "head_z.2"]


def spec(root: str) -> ExtractionSpec:
    return ExtractionSpec(root=root, tokens_per_batch=128, batches_per_shard=3)


class Killer(L.Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_predict_batch_end(self, *args: object, **kwargs: object) -> None:
        self.batches -= 1
        if not self.batches:
            os.kill(os.getpid(), signal.SIGKILL)


def main(root: str, devices: str, batches: str = "0", shard: str = "") -> None:
    torch.set_num_threads(1)
    options = {"accelerator": "cpu", "devices": int(devices), "enable_progress_bar": False}
    if int(devices) > 1:
        options["strategy"] = "ddp"
    options["callbacks"] = [Killer(int(batches))]
    store = ensure_store(loaded(), prompts(), SITES, spec(root), trainer_kwargs=options)
    assert [str(site) for site in store.sites] == SITES
    if shard:
        if first():
            next(store.folder.rglob(shard)).unlink()
        torch.distributed.barrier()
        ensure_store(loaded(), prompts(), SITES, spec(root), trainer_kwargs=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
