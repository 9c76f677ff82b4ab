"""The memory of messages: kept from one attention to the next and shared by all layers.

One pass (the forward or the backward of one attention) borrows a ``Workspace`` and takes named
buffers from it; ``plan/buffer_sizes.py`` lists their names and sizes. A buffer grows to the largest
message that it has held and is then reused, so the memory in use is what the largest pass needs,
however many layers and masks there are. A pass that resembles an earlier one allocates nothing.

Fresh memory for each message would cost more than its allocation: every page is slow to touch for
the first time.

Results, gradients and tensors that autograd keeps outlive the pass, so they must never lie in a
buffer.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Workspace:
    """The buffers of one pass. One thread uses it at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns contiguous memory whose content is undefined.

        A tensor that was taken under the same name before shares its memory. Every message that
        reads or fills that tensor must have completed.
        """
        size = math.prod(shape) * dtype.itemsize
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            self._buffers.pop(name, None)
            del held  # free it before its successor is allocated
            # A tensor made in inference mode could not be written outside it.
            with torch.inference_mode(False):
                held = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._buffers[name] = held
        return held[:size].view(dtype).view(*shape)

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() for buffer in list(self._buffers.values()))


class Buffers:
    """Workspaces, each lent to one pass at a time. Safe to use from several threads.

    There is one workspace for each device (on CUDA for each stream, because a stream orders the
    writes) and for each pass that runs at the same time; training runs one pass at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: defaultdict[object, list[Workspace]] = defaultdict(list)
        self._lent: list[Workspace] = []
        self._peak = 0

    @contextmanager
    def lend(self, device: torch.device) -> Iterator[Workspace]:
        """Lends a workspace until the end of the ``with`` block.

        All messages must have completed by then. After an error some may still be in flight, so
        that workspace is dropped and never lent again.
        """
        place: object = device
        if device.type == "cuda":
            place = (device, torch.cuda.current_stream(device).cuda_stream)
        with self._lock:
            free = self._free[place]
            workspace = free.pop() if free else Workspace(device)
            self._lent.append(workspace)
        finished = False
        try:
            yield workspace
            finished = True
        finally:
            with self._lock:
                self._peak = max(self._peak, self._count())
                self._lent = [other for other in self._lent if other is not workspace]
                if finished:
                    self._free[place].append(workspace)

    @property
    def held_bytes(self) -> int:
        """Bytes of all workspaces, lent or free."""
        with self._lock:
            return self._count()

    @property
    def peak_bytes(self) -> int:
        """The maximum of ``held_bytes`` so far."""
        with self._lock:
            return max(self._peak, self._count())

    def _count(self) -> int:
        free = [workspace for group in self._free.values() for workspace in group]
        return sum(workspace.held_bytes for workspace in (*free, *self._lent))
