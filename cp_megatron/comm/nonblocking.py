"""Collectives under way: started now, awaited later, computed past in between. No gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed both and deprecates the old names with a warning per call.
_all_gather: Callable[..., dist.Work] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_reduce_scatter: Callable[..., dist.Work] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


@dataclass(frozen=True)
class Started:
    """A collective under way. The input must not be touched before ``wait`` returns."""

    work: dist.Work | None
    source: Tensor
    """Keeps the memory alive until the collective is done."""
    result: Tensor

    def wait(self) -> Tensor:
        """The result. On CUDA the current stream waits instead of the host."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_all_gather(
    x: Tensor, group: ProcessGroup | None, result: Tensor | None = None
) -> Started:
    """The ranks' tensors one after the other: ``[n, ..] -> [ranks * n, ..]``.

    Args:
        x: contiguous, of the same shape on every rank.
        group: None is one rank and sends nothing.
        result: where to; by default memory of its own.
    """
    if group is None or group.size() == 1:
        return Started(None, x, x)
    if result is None:
        result = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    return Started(_all_gather(result, x, group=group, async_op=True), x, result)


def start_reduce_scatter(
    x: Tensor, group: ProcessGroup | None, result: Tensor | None = None
) -> Started:
    """This rank's part of the ranks' sum: ``[ranks * n, ..] -> [n, ..]``.

    Args:
        x: contiguous, of the same shape on every rank.
        group: None is one rank and sends nothing.
        result: where to; by default memory of its own.
    """
    if group is None or group.size() == 1:
        return Started(None, x, x)
    if result is None:
        result = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    return Started(_reduce_scatter(result, x, group=group, async_op=True), x, result)
