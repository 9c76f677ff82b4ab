"""The memory that messages live in: kept from one attention to the next, shared by all layers.

A pass (one forward or one backward of one attention) borrows a ``Workspace`` and takes named rooms
in it: what each room is for, and how many there are, is said where it is taken. A room grows to the
largest message that ever lay in it and is then reused as it is, so what is kept is what the largest
pass needed, however many layers and masks there are, and a pass like one before allocates nothing.

Fresh memory for each message would cost more than the allocation: the first touch of every page.

Whatever outlives the pass (results, gradients, what autograd keeps) must never lie in a room.
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
    """Rooms for the messages of one pass. Used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory to write in, contiguous, with whatever lay there before.

        What was given under this name before lies in the same memory: every message that reads or
        fills it must have been waited for.
        """
        size = math.prod(shape) * dtype.itemsize
        held = self._rooms.get(name)
        if held is None or held.numel() < size:
            self._rooms.pop(name, None)
            del held  # before its successor is allocated, so that they are never held together
            # A tensor made in inference mode could not be written outside it.
            with torch.inference_mode(False):
                held = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._rooms[name] = held
        return held[:size].view(dtype).view(*shape)

    @property
    def held_bytes(self) -> int:
        """Bytes of all rooms."""
        return sum(room.numel() for room in list(self._rooms.values()))


class Buffers:
    """Workspaces, lent to one pass each. Safe to use from several threads.

    There is one for each device (on CUDA: each stream, which orders what is written in it) and for
    each pass that runs at the same time, which is one in training.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: defaultdict[object, list[Workspace]] = defaultdict(list)
        self._lent: list[Workspace] = []
        self._peak = 0

    @contextmanager
    def lend(self, device: torch.device) -> Iterator[Workspace]:
        """A workspace until the end of the ``with`` block, when no message may be under way.

        After an error some may be: such a workspace is given up, never lent again.
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
        """Bytes held now, in use or not."""
        with self._lock:
            return self._count()

    @property
    def peak_bytes(self) -> int:
        """The most that was ever held."""
        with self._lock:
            return max(self._peak, self._count())

    def _count(self) -> int:
        free = [workspace for group in self._free.values() for workspace in group]
        return sum(workspace.held_bytes for workspace in (*free, *self._lent))
