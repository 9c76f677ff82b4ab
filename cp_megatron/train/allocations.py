"""Counting the bytes that torch takes from the CPU's allocator, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


@dataclass(kw_only=True)
class MemoryCount:
    """What was counted; filled in when counting ends.

    Attributes:
        peak: most bytes held at once, over the level at the start.
        held: bytes over that level at the end.
        allocations: sizes of what was allocated, in order.
    """

    peak: int = 0
    held: int = 0
    allocations: tuple[int, ...] = ()


@contextmanager
def counting_memory() -> Iterator[MemoryCount]:
    """Counts what this thread allocates inside the ``with`` block.

    Every allocation and release is an event of torch's profiler, so nothing is sampled and neither
    the process's size nor what the C library keeps plays a part. Memory that was allocated before
    and is released inside is not seen. Profiles can not be nested.
    """
    count = MemoryCount()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield count
    kineto = recorded.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    levels = list(accumulate(changes, initial=0))
    count.peak, count.held = max(levels), levels[-1]
    count.allocations = tuple(size for size in changes if size > 0)
