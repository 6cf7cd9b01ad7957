"""Compile the parts of a model that are many small operations: norms and MLPs.

Attention stays as it is: kept keys and values would make one compilation of each block. Sites are read from
modules, outside of what is compiled, so that every site can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mechdiff.interventions.hooks import _MLP, _part, get_blocks


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Run compiled norms and MLPs within the context; results are rounded otherwise.

    Args:
        model: A decoder-only transformers model, on one device.

    Raises:
        SiteError: If a block has no MLP.
    """
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    parts = [*norms, *(_part(block, _MLP, "MLP") for block in get_blocks(model))]
    for part in parts:
        part.__dict__["forward"] = torch.compile(part.forward, dynamic=True)
    try:
        yield
    finally:
        for part in parts:
            del part.__dict__["forward"]
