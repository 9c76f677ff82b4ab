"""Counts the bytes that torch takes from the CPU's allocator, and those that autograd keeps."""

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
    """The result, which is set when counting ends.

    Attributes:
        peak: the most bytes held at once, above the level at the start.
        held: bytes above that level at the end.
        allocations: sizes of the allocations, in order.
    """

    peak: int = 0
    held: int = 0
    allocations: tuple[int, ...] = ()


@contextmanager
def counting_memory() -> Iterator[MemoryCount]:
    """Counts what this thread allocates inside the ``with`` block.

    Every allocation and release is an event of torch's profiler, so the count is exact and does not
    depend on the size of the process. Memory that was allocated before and is released inside is
    not seen. Profiles cannot be nested.
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
    """Bytes that autograd keeps between ``forward`` and backward, not counting weights.

    Every storage counts once, with its size at the end of forward. Backward runs too, which frees
    what was kept; gradients are left in the parameters.

    Args:
        model: its weights, also those that FSDP gathers, do not count.
        forward: returns what is differentiated.
    """
    weights: set[int] = set()
    kept: dict[int, torch.UntypedStorage] = {}

    def skip(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            weights.add(local.untyped_storage()._cdata)

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    handles = [module.register_forward_pre_hook(skip) for module in model.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = forward()
    finally:
        for handle in handles:
            handle.remove()
    num_bytes = sum(storage.nbytes() for storage in kept.values())
    result.backward()
    return num_bytes
