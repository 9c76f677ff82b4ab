"""Copies between the host and a GPU that the host does not wait for.

A copy from or to ordinary memory of the host makes the host wait until the device has finished all
that it was given before. Copies from and to pinned memory only join the device's queue.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the host in a form that ``to_device`` copies without waiting."""
    return x.pin_memory() if device.type == "cuda" else x


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns a host tensor's copy on the device. Later operations on the device may read it."""
    return pinned(x, device).to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor on its way to the host.

    Args:
        x: must not be changed until it is read. On the CPU it is not copied.
    """

    def __init__(self, x: Tensor) -> None:
        self._values, self._arrived = x, None
        if x.is_cuda:
            self._values = torch.empty_like(x, device="cpu", pin_memory=True)
            self._values.copy_(x, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()

    def read(self) -> list[float]:
        """Waits until the device has computed the values, and returns them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
