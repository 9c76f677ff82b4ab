"""Whether the ranks stop early, which they decide together."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch.distributed as dist

from cp_megatron.comm.host_numbers import largest
from cp_megatron.comm.signals import StopRequest

Item = TypeVar("Item")

_TIME_IS_OVER = int(signal.NSIG)
"""The wish to stop because the time is over; no signal has this number."""


class Stopping:
    """The wish of any rank to stop, because of a signal or because its time is over.

    A signal reaches the ranks at different moments, and their clocks differ. So all of them tell
    each other at the same places of the program: in a message of their own (``agreed``), or in one
    that they send anyway (``note``, then ``heard``).

    Args:
        request: the signal that this rank has received, if any.
        group: a group of all ranks for CPU tensors.
        end: when the time of this rank is over, on ``time.monotonic()``.
        limit: what sets this time.

    Attributes:
        reason: what they agreed to stop for; empty as long as they did not.
        wish: this rank's wish at the last ``note``, a number to send; 0 is to go on.
    """

    def __init__(
        self,
        request: StopRequest,
        group: dist.ProcessGroup,
        *,
        end: float = math.inf,
        limit: str = "the end of its time",
    ) -> None:
        self.reason, self.wish = "", 0
        self._request, self._group, self._end, self._limit = request, group, end, limit

    def note(self) -> None:
        """Notes whether this rank wishes to stop now."""
        self.wish = 0 if time.monotonic() < self._end else _TIME_IS_OVER
        if self._request.signal is not None:
            self.wish = int(self._request.signal)

    def heard(self, wish: int) -> bool:
        """Whether the ranks stop, given the largest wish of all. Every rank calls this alike."""
        if wish and not self.reason:
            over = wish == _TIME_IS_OVER
            self.reason = self._limit if over else signal.Signals(wish).name
        return bool(self.reason)

    def agreed(self) -> bool:
        """Whether the ranks stop. Every rank calls this and gets the same answer."""
        if not self.reason:
            self.note()
            self.heard(largest(self.wish, self._group))
        return bool(self.reason)

    def limit(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items until the ranks stop. All ranks must have as many items."""
        for item in items:
            if self.agreed():
                return
            yield item
