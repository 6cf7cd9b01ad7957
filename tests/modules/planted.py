"""Stores written by hand, whose difference is known, and a trainer for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import lightning as L
import torch
from torch import Tensor

from mechdiff.data.activations import ActivationPairs
from mechdiff.data.manifest import Contents, Example, Pass, Shard, StoreIdentity, checksum
from mechdiff.interventions.sites import Site

PROMPTS, USER_TOKENS = 40, 6
ROWS = PROMPTS * (USER_TOKENS + 2)  # the template adds one token and the last


def states(d: int = 12, seed: int = 0, rows: int = ROWS) -> Tensor:
    """Draw source states with a mean and dimensions of unequal scale, `(rows, d)`."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=draws) * torch.linspace(0.5, 3, d) + torch.linspace(-1, 1, d)


def affine(x: Tensor, site: int = 0, noise: float = 0.01, d: int | None = None) -> Tensor:
    """Return x·W + b + noise with W a random change of the identity (or of zero, to another width)."""
    draws = torch.Generator().manual_seed(1 + site)
    width = d or x.shape[1]
    change = 0.3 * torch.randn(x.shape[1], width, generator=draws)
    start = torch.eye(width) if d is None else 0
    return x @ (start + change) + 0.5 + noise * torch.randn(len(x), width, generator=draws)


def neutral(_prompt: int) -> str:
    """Give every prompt the same class."""
    return "neutral"


def alternating(prompt: int) -> str:
    """Make every other prompt a target."""
    return "target" if prompt % 2 else "neutral"


def write_store(
    root: Path,
    sites: Mapping[str, Tensor],
    name: str,
    dtype: str = "float32",
    label: Callable[[int], str] = neutral,
) -> Path:
    """Write a store with one shard; rows are prompts times (user tokens, template, last)."""
    identity = StoreIdentity(f"{name}/float32", "tokenizer", "template", "texts", "all", dtype)
    folder = root / identity.key
    widths = {Site.parse(site): values.shape[1] for site, values in sites.items()}
    inside = folder / Pass.name(widths)
    inside.mkdir(parents=True)
    examples = [Example(f"p{i}", "en", label(i), f"s{i}", f"t{i}") for i in range(PROMPTS)]
    Contents(identity, examples, [b"<"], [b">", b":"]).write(folder)
    per = USER_TOKENS + 2
    columns = {
        "example": torch.arange(PROMPTS).repeat_interleave(per),
        "region": torch.tensor([1] * USER_TOKENS + [2, 2]).repeat(PROMPTS),
        "offset": torch.tensor([*range(1, USER_TOKENS + 1), -2, -1]).repeat(PROMPTS),
        "position": torch.arange(1, per + 1).repeat(PROMPTS),
    }
    path = inside / "shard-00000.h5"
    with h5py.File(path, "w") as file:
        for column, values in columns.items():
            file[f"rows/{column}"] = values.numpy()
        for site, values in sites.items():
            file[f"sites/{site}"] = values.numpy()
    Pass(inside, widths, [Shard(path.name, ROWS, checksum(path))]).write(identity.key)
    return folder


def planted(
    root: Path,
    change: Callable[[Tensor, int], Tensor],
    sites: int = 2,
    d: int = 12,
    label: Callable[[int], str] = neutral,
    kind: type[ActivationPairs] = ActivationPairs,
    **options: object,
) -> ActivationPairs:
    """Make the data of a pair whose target states are `change` of its source states."""
    source = {f"resid_post.{i}": states(d, seed=10 + i) for i in range(sites)}
    target = {name: change(x, i) for i, (name, x) in enumerate(source.items())}
    folders = [
        write_store(root, side, name, label=label) for name, side in (("source", source), ("target", target))
    ]
    settings = {"tokens": None, "batch_size": 64, **options}
    return kind(*map(str, folders), sites=list(source), **settings)


def widths(data: ActivationPairs) -> dict[str, object]:
    """Return the arguments of a module that come from its data."""
    return {"sites": data.sites, "d_source": data.d_source, "d_target": data.d_target, "noise": data.noise}


def trainer(**options: object) -> L.Trainer:
    """Make a quiet trainer on one CPU that writes nothing."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "num_sanity_val_steps": 0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return L.Trainer(**{**settings, **quiet, **options})


def fitted(module: L.LightningModule, data: ActivationPairs, **options: object) -> list:
    """Fit and test a module, and return its records."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = trainer(**options)
        runner.fit(module, datamodule=data)
        runner.test(module, datamodule=data, verbose=False)
    return list(module.records())
