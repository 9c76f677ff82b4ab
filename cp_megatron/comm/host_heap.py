"""How the C library's heap treats memory that is freed."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3) in glibc.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets tensors on the CPU reuse the memory of freed ones, instead of new pages of the system.

    By default, glibc returns large blocks to the system when they are freed. The next tensor of
    their size then takes a page fault for each 4 KiB, in which the system writes zeros: together as
    long as writing the tensor several times. Gradients of weights are freed in every step.

    The process keeps the most memory that it has had. It must be called before the large
    allocations. Other C libraries do not have the function, and nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # no block has pages of its own
        mallopt(_TRIM_THRESHOLD, -1)  # the end of the heap is never returned
