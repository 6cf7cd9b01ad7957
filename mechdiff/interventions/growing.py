"""Keys and values that grow in place, for decoding.

The library's own layer copies all that it holds at every token, which is a fifth to a third of the time of a
step on a CPU. Here new tokens are written behind the old ones, into room that is made for many at once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64
"""Tokens that room is made for at once."""


class GrowingLayer(DynamicLayer):
    """A layer that keeps room behind its keys and values. It has one owner: a shallow copy would share it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write behind what is held, `(rows, heads, T, width)`, and return all of it."""
        assert self.keys is not None
        assert self.values is not None
        held = self.keys.shape[-2]
        length = held + key_states.shape[-2]
        if not self._fits(length):
            self._room = _roomy(self.keys, length), _roomy(self.values, length)
        assert self._room is not None
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, held:length] = new
        self.keys, self.values = (room[:, :, :length] for room in self._room)
        return self.keys, self.values

    def _fits(self, length: int) -> bool:
        """Tell whether what is held still lies in the room, and more would."""
        if self.keys is None or self._room is None or self._room[0].shape[-2] < length:
            return False
        same = self.keys.data_ptr() == self._room[0].data_ptr()
        return same and self.keys.shape[0] == self._room[0].shape[0]


def growing(cache: DynamicCache) -> DynamicCache:
    """Give a cache room; layers of another kind, such as those that keep a window, stay as they are.

    Args:
        cache: Its layers are replaced.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = GrowingLayer(layer.keys, layer.values)
    return cache


def _roomy(held: Tensor, length: int) -> Tensor:
    rows, heads, kept, width = held.shape
    room = held.new_empty(rows, heads, length + ROOM, width)
    room[:, :, :kept] = held
    return room
