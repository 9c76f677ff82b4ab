"""Stopping in good order: a signal asks, the ranks agree, the step in progress is finished."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether someone asked this rank to stop.

    A second signal changes nothing: under torchrun a Ctrl-C reaches a rank twice, from the
    terminal and from torchrun, and must not tear the save that the first one began.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal = self.signal or signal.Signals(number)

    def agreed(self, group: dist.ProcessGroup | None) -> bool:
        """Whether any rank was asked; the same answer on all of them.

        Args:
            group: a group of CPU tensors over all ranks; None is this rank alone.
        """
        asked = torch.tensor(int(self.signal is not None))
        if group is not None and group.size() > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=group)
        return bool(asked.item())


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM inside the block."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in CAUGHT}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
