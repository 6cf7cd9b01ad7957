"""A fit by descent, as a script: `python -m tests.modules.descent_job KIND FOLDER PROCESSES [ACCELERATOR]`.

Each process takes its share of the same rows per step, so any number of them takes the same steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mechdiff.data.activations import ActivationPairs
from mechdiff.data.contrast import ContrastPairs
from mechdiff.modules import CLTMapSGD, SteeringSubspaceSGD
from tests.modules.planted import affine, alternating, planted, trainer, widths

ROWS_PER_STEP = {"clt": 32, "steering": 6}


def main(kind: str, folder: str, processes: str, accelerator: str = "cpu") -> None:
    torch.set_num_threads(1)
    world, root = int(processes), Path(folder)
    label, data_class = (alternating, ContrastPairs) if kind == "steering" else (None, ActivationPairs)
    if not root.exists():
        planted(root, affine, **({"label": label, "kind": data_class} if label else {}))
    folders = {
        name: str(path.parent)
        for name in ("source", "target")
        for path in root.glob("*/manifest.json")
        if f'"{name}/' in path.read_text()
    }
    names = ["resid_post.0", "resid_post.1"]
    data = data_class(**folders, sites=names, tokens=None, batch_size=ROWS_PER_STEP[kind] // world)
    if kind == "clt":
        module = CLTMapSGD(**widths(data), learning_rate=0.05, weight_decay=1e-4)
    else:
        module = SteeringSubspaceSGD(**widths(data), k=2, learning_rate=0.02, penalty=0.1)
    options = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    runner = trainer(max_epochs=3, accelerator=accelerator, **options)
    runner.fit(module, datamodule=data)
    if runner.is_global_zero:
        state = {name: part for name, part in module.state_dict().items() if "shuffled" not in name}
        losses = {name: float(value) for name, value in runner.callback_metrics.items()}
        torch.save({"state": state, "losses": losses}, root / f"{kind}-{world}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
