"""Counting bytes: what torch takes from the CPU's allocator, what autograd keeps; to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between ``forward`` and backward, weights left out.

    Every storage counts once, as large as it is when forward has ended. Backward runs too, which
    lets go of what was kept; gradients are left in the parameters.

    Args:
        model: whose weights, also those that FSDP gathers, do not count.
        forward: its result is differentiated.
    """
    weights: set[int] = set()
    found: dict[int, torch.UntypedStorage] = {}

    def meet(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            weights.add(local.untyped_storage()._cdata)

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return x

    handles = [module.register_forward_pre_hook(meet) for module in model.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = forward()
    finally:
        for handle in handles:
            handle.remove()
    kept = sum(storage.nbytes() for storage in found.values())
    result.backward()
    return kept
