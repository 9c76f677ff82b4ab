"""Nonblocking collectives without gradients: started now and awaited later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.host_collectives import (
    HostWork,
    start_host_gather,
    start_host_reduce_scatter,
)

# torch 2.13 renamed both, and warns about the old names at each call.
_all_gather: Callable[..., dist.Work] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_reduce_scatter: Callable[..., dist.Work] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


@dataclass(frozen=True)
class Started:
    """A collective in flight. The input must not be modified before ``wait`` returns.

    ``source`` keeps the memory of the input alive until then.
    """

    work: dist.Work | HostWork | None
    source: Tensor
    result: Tensor

    def wait(self) -> Tensor:
        """Returns the result. On CUDA, the current stream waits instead of the host."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_all_gather(
    x: Tensor, group: ProcessGroup | None, result: Tensor | None = None
) -> Started:
    """Starts to concatenate the ranks' tensors: ``[n, ..] -> [ranks * n, ..]``.

    Args:
        x: contiguous, of the same shape on every rank.
        group: the ranks; None is one rank and sends nothing.
        result: memory for the result; allocated by default.
    """
    if group is None or group.size() == 1:
        return Started(None, x, x)
    if result is None:
        result = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    if x.device.type == "cpu":
        return Started(start_host_gather(result, x, group), x, result)
    return Started(_all_gather(result, x, group=group, async_op=True), x, result)


def start_reduce_scatter(
    x: Tensor, group: ProcessGroup | None, result: Tensor | None = None
) -> Started:
    """Starts to compute this rank's part of the ranks' sum: ``[ranks * n, ..] -> [n, ..]``.

    Arguments are those of ``start_all_gather``.
    """
    if group is None or group.size() == 1:
        return Started(None, x, x)
    if result is None:
        result = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    if x.device.type == "cpu":
        return Started(start_host_reduce_scatter(result, x, group), x, result)
    return Started(_reduce_scatter(result, x, group=group, async_op=True), x, result)
