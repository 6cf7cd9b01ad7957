"""Find the attention of a block, and the blocks that have softmax heads."""

from __future__ import annotations

from torch import nn

from mechdiff.interventions.hooks import _ATTENTION, _part_path, get_blocks


def attention_path(block: nn.Module) -> str:
    """Find the dotted name of the attention module within a block.

    Raises:
        SiteError: If there is none.
    """
    return _part_path(block, _ATTENTION, "attention")


def head_layers(model: nn.Module) -> list[int]:
    """List the blocks whose attention has softmax heads; others mix tokens in another way (a recurrence)."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)  # type: ignore[union-attr,operator]
    found = []
    for index, block in enumerate(get_blocks(model)):
        named = any(path.rsplit(".", 1)[-1] in _ATTENTION for path, _ in block.named_modules())
        if named and not (kinds and "linear" in kinds[index]):
            found.append(index)
    return found
