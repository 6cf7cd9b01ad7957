"""Say which part of a model goes to which device, before it is read.

1. On a GPU a model is read straight onto it.
2. On several, each gets the same number of consecutive blocks, as nearly as can be; what comes before the
   blocks is with the first, what comes after with the last. A tied head stays with its embedding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mechdiff.errors import PairError
from mechdiff.interventions.hooks import blocks_path


def placement(folder: Path, device: torch.device, cards: int = 1) -> dict[str, str] | None:
    """Return the device of each part of a model, or None where it is read on the CPU and moved.

    Args:
        folder: The model's, of which only the config is read.
        device: The device, or the first of several.
        cards: How many there are.

    Raises:
        PairError: If there are not as many.
    """
    if device.type != "cuda":
        if cards > 1:
            raise PairError(f"cards is {cards} on {device.type}; allowed: 1, or GPUs (key: pair.cards)")
        return None
    first, there = device.index or 0, torch.cuda.device_count()
    if first + cards > there:
        raise PairError(
            f"cards is {cards} from GPU {first}; allowed: up to {there - first}, {there} are there "
            "(keys: pair.cards, trainer.devices)"
        )
    if cards == 1:
        return {"": f"cuda:{first}"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return split(model, [f"cuda:{first + card}" for card in range(cards)])


def split(model: nn.Module, devices: list[str]) -> dict[str, str]:
    """Deal the parts of a model to devices.

    Args:
        model: A decoder-only transformers model.
        devices: Where its parts go, in order.
    """
    places: dict[str, str] = {}
    node, path = model, ""
    names = blocks_path(model).split(".")
    for name in names:
        before = True
        for child, _ in node.named_children():
            before = before and child != name
            if child != name:
                places[f"{path}{child}"] = devices[0 if before else -1]
        node, path = node.get_submodule(name), f"{path}{name}."
    depth = len(list(node.children()))
    for index in range(depth):
        places[f"{path}{index}"] = devices[index * len(devices) // depth]
    head, embedding = (getattr(model, f"get_{which}_embeddings")() for which in ("output", "input"))
    if head is not None and head.weight is embedding.weight:
        places[next(name for name, module in model.named_modules() if module is head)] = devices[0]
    return places
