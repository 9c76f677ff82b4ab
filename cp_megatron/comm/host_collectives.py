"""Gathers and reduce-scatters of CPU tensors, as messages straight from rank to rank.

Gloo gathers into buffers of its own, and reduces with a whole all-reduce: each rank then receives
twice the bytes. Here they arrive at their place, and each rank adds up its own part alone, in the
order of the ranks. Two ranks with 22 MB each: a gather takes half the time, a reduce-scatter a
fifth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.trace import waiting_for

_TAG = 1
"""Keeps these messages apart from those of an exchange in the same group, which have tag 0."""


class HostWork:
    """Messages under way, and the sum that is taken when they have arrived."""

    def __init__(
        self, works: Sequence[dist.Work | None], summed: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._works, self._summed = works, summed
        self._name = "a gather" if summed is None else "a sum"

    def wait(self) -> None:
        """Waits for all messages; a second call does nothing."""
        with waiting_for(self._name):
            for work in self._works:
                if work is not None:
                    work.wait()
        if self._summed is not None:
            parts, result = self._summed
            torch.sum(parts, 0, out=result)
        self._works, self._summed = (), None


def start_host_gather(result: Tensor, x: Tensor, group: ProcessGroup) -> HostWork:
    """Starts to concatenate the ranks' tensors in ``result``, ``[n, ..] -> [ranks * n, ..]``.

    Args:
        result: contiguous; ``x`` may be this rank's part of it.
        x: contiguous, of the same shape on every rank.
        group: the ranks.
    """
    rank, parts = group.rank(), result.view(group.size(), *x.shape)
    if parts[rank].data_ptr() != x.data_ptr():
        parts[rank].copy_(x.detach())
    peers = [peer for peer in range(group.size()) if peer != rank]
    works = [dist.irecv(parts[peer], group=group, tag=_TAG, group_src=peer) for peer in peers]
    works += [dist.isend(x, group=group, tag=_TAG, group_dst=peer) for peer in peers]
    return HostWork(works)


def start_host_reduce_scatter(result: Tensor, x: Tensor, group: ProcessGroup) -> HostWork:
    """Starts to sum the ranks' parts for this rank, ``[ranks * n, ..] -> [n, ..]``.

    Args:
        result: contiguous.
        x: contiguous, of the same shape on every rank.
        group: the ranks.
    """
    parts = torch.empty_like(x)
    work = dist.all_to_all_single(parts, x, group=group, async_op=True)
    return HostWork([work], (parts.view(group.size(), *result.shape), result))


class HostGather:
    """FSDP's all-gather of weights; an ``AllGather`` of ``torch.distributed.fsdp``."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the result."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> HostWork | None:
        work = start_host_gather(output_tensor, input_tensor, group)
        if async_op:
            return work
        work.wait()
        return None


class HostReduceScatter(HostGather):
    """FSDP's reduce-scatter of gradients; a ``ReduceScatter`` of ``torch.distributed.fsdp``."""

    def __call__(  # type: ignore[override]
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> HostWork | None:
        assert op == dist.ReduceOp.SUM, "gradients are summed"
        work = start_host_reduce_scatter(output_tensor, input_tensor, group)
        if async_op:
            return work
        work.wait()
        return None
