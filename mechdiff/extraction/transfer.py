"""Bring activations to the host without holding up the device.

1. On a GPU a copy runs on a stream of its own, into pinned memory, while the next batch is computed.
2. Whoever writes the rows waits for them; whoever computes does not.
3. Elsewhere there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Waiting = Callable[[], list[Tensor]]
"""Waits for copies, and returns them."""


class HostCopies:
    """Starts copies to the host, each beside the computation of the device that it comes from."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, tensors: Sequence[Tensor]) -> Waiting:
        """Start to copy tensors.

        Args:
            tensors: Results of the current stream of their device, which nobody changes afterwards.

        Returns:
            A function, for any thread, that waits for the copies and returns them in order.
        """
        copies = [self._copy(tensor) for tensor in tensors]
        events = {device: stream.record_event() for device, stream in self._streams.items()}

        def wait() -> list[Tensor]:
            for event in events.values():
                event.synchronize()
            return copies

        return wait

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu()
        device = tensor.device
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away while it is read
        return host
