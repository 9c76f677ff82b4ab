"""A process group for several ranks on one GPU: sends CUDA tensors through the host, over gloo.

NCCL refuses two ranks on one GPU, and gloo cannot send CUDA tensors. This group copies what is sent
to the host and what is received to the GPU, and lets gloo do the rest, so that one GPU runs the
whole program of several ranks: kernels, streams, FSDP. It tests neither NCCL nor speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

NAME = "staged"


class StagedGroup(dist.ProcessGroup):
    """Each method copies inputs to the host, calls gloo, and copies results to their tensors."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._gloo = gloo

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return NAME

    @property
    def group_name(self) -> str:
        """The name in torch's table, because a group written in Python has none itself."""
        return dist.distributed_c10d._world.pg_names[self]

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> dist.Work:
        return self._run(lambda host: self._gloo.send(host, rank, tag), tensors, [])

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> dist.Work:
        return self._run(lambda host: self._gloo.recv(host, rank, tag), tensors, tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._run(lambda host: self._gloo.broadcast(host, opts), tensors, tensors)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._run(lambda host: self._gloo.allreduce(host, opts), tensors, tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        (results,), (x,) = outputs, inputs

        def start(host: list[Tensor]) -> dist.Work:
            return self._gloo.allgather([host[:-1]], [host[-1]])

        return self._run(start, [*results, x], results)

    def all_gather_single(self, output: Tensor, x: Tensor, opts: Any = None) -> dist.Work:
        def start(host: list[Tensor]) -> dist.Work:
            return self._gloo.allgather([list(host[0].chunk(self.size()))], [host[1]])

        return self._run(start, [output.flatten(), x.flatten()], [output])

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any = None) -> dist.Work:
        def start(host: list[Tensor]) -> dist.Work:
            return self._gloo.allreduce([host[1]])

        def take(host: list[Tensor]) -> list[Tensor]:
            return [host[1].chunk(self.size())[self.rank()]]

        return self._run(start, [output.flatten(), x.flatten()], [output], take)

    def all_to_all_single(
        self, output: Tensor, x: Tensor, outputs: list[int], inputs: list[int], opts: Any = None
    ) -> dist.Work:
        def start(host: list[Tensor]) -> dist.Work:
            return self._gloo.alltoall_base(host[0], host[1], outputs, inputs)

        return self._run(start, [output, x], [output])

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        (output,), (x,) = outputs, inputs
        return self.all_gather_single(output, x)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        (output,), (x,) = outputs, inputs
        return self.reduce_scatter_single(output, x)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        (x,) = tensors
        return self.allreduce([x], opts)

    def barrier(self, opts: Any = None) -> dist.Work:
        self._gloo.barrier().wait()
        return self._run(lambda host: None, [], [])

    # torch 2.13 renamed these.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _run(
        self,
        start: Callable[[list[Tensor]], dist.Work | None],
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
        take: Callable[[list[Tensor]], Sequence[Tensor]] = lambda host: host,
    ) -> dist.Work:
        # Copying to the host waits for the GPU.
        host = [x.detach().to("cpu", copy=True).contiguous() for x in tensors]
        return _Staged(start(host), results, lambda: take(host))


class _Staged(dist._Work):
    """A message under way; ``wait`` copies its result to the GPU."""

    def __init__(
        self,
        work: dist.Work | None,
        results: Sequence[Tensor],
        received: Callable[[], Sequence[Tensor]],
    ) -> None:
        super().__init__()
        self._work, self._results, self._received = work, results, received

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._work is not None:
            self._work.wait()
            for target, x in zip(self._results, self._received()):
                target.detach().copy_(x.view(target.shape))
            self._work = None
        return True

    def is_completed(self) -> bool:
        return self._work is None

    def get_future(self) -> Future[Any]:
        self.wait()
        future: Future[Any] = Future()
        future.set_result(list(self._results))
        return future


def join(store_path: str, rank: int, world_size: int) -> None:
    """Makes this the default process group for CPU and CUDA tensors."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, _create, devices=["cpu", "cuda"])
    dist.init_process_group(
        NAME, init_method=f"file://{store_path}", rank=rank, world_size=world_size
    )


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> StagedGroup:
    gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
    return StagedGroup(gloo, rank, size)
