"""Gathers and reduce-scatters of CPU tensors, as messages straight from rank to rank.

Gloo gathers into buffers of its own, and reduces with a whole all-reduce: each rank then receives
twice the bytes. Here they arrive at their place, and each rank adds up its own part alone, in the
order of the ranks. Two ranks with 22 MB each: a gather takes half the time, a reduce-scatter a
fifth.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import ProcessGroup

from cp_megatron.comm.trace import waiting_for

_TAG = 1
"""Keeps these messages apart from those of an exchange in the same group, which have tag 0."""


class HostWork(dist.Work):
    """Messages under way, and the sum that is taken when they have arrived."""

    def __init__(
        self, works: Sequence[dist.Work | None], summed: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._works, self._summed = works, summed
        self._name = "a gather" if summed is None else "a sum"

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits for all messages; a second call does nothing."""
        with waiting_for(self._name):
            for work in self._works:
                if work is not None:
                    work.wait() if timeout is None else work.wait(timeout)
        if self._summed is not None:
            parts, result = self._summed
            torch.sum(parts, 0, out=result)
        self._works, self._summed = (), None
        return True


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


class HostReductions:
    """The last reduce-scatter of a model's gradients, which may be under way during backward."""

    def __init__(self) -> None:
        self._work: HostWork | None = None

    def hold(self, work: HostWork) -> None:
        """Takes over a work, which is finished at the end of the backward pass at the latest."""
        self._work = work
        Variable._execution_engine.queue_callback(self.finish)  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Waits for it."""
        work, self._work = self._work, None
        if work is not None:
            work.wait()


class HostReduceScatter(HostGather):
    """FSDP's reduce-scatter of gradients; a ``ReduceScatter`` of ``torch.distributed.fsdp``.

    FSDP expects a finished result. On a GPU a stream waits for it, but on a CPU the rank would, for
    its own messages and for slower ranks. If FSDP only makes views of the result, it is finished
    later: before the next reduce-scatter, or at the end of the backward pass. Messages then travel
    during the backward pass of the next layer.

    Args:
        parameters: the sharded parameters whose gradients are reduced.
        reductions: the works of the model; None: results are always finished at once.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], reductions: HostReductions | None
    ) -> None:
        self._parameters, self._reductions = parameters, reductions

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the input or the result; the last reduce-scatter releases its own first."""
        if self._reductions is not None:
            self._reductions.finish()
        return super().allocate(size, dtype=dtype, device=device)

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
        if self._reductions is not None and self._is_only_viewed(output_tensor):
            self._reductions.hold(work)
        else:
            work.wait()
        return None

    def _is_only_viewed(self, result: Tensor) -> bool:
        """Whether FSDP neither adds the result to a gradient nor rounds it."""
        return all(x.grad is None and x.dtype == result.dtype for x in self._parameters)
