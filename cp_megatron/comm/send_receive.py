"""Messages between two ranks of a group, posted together and awaited together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.checksums import LinkSums


@dataclass(frozen=True)
class Pending:
    """Messages under way. The buffers must not be touched before ``wait`` returns."""

    works: Sequence[dist.Work]
    buffers: Sequence[Tensor]
    """Keeps the memory alive until the messages have left."""
    receives: Sequence[tuple[Tensor, int]]
    sums: LinkSums
    """Notes what was received."""

    def wait(self) -> None:
        """Returns once everything posted has been sent and received.

        On CUDA it makes the current stream wait instead of the host.
        """
        for work in self.works:
            work.wait()
        for tensor, peer in self.receives:
            self.sums.received(tensor, peer)


def post(
    group: dist.ProcessGroup | None,
    *,
    sends: Sequence[tuple[Tensor, int]] = (),
    receives: Sequence[tuple[Tensor, int]] = (),
    sums: LinkSums,
) -> Pending:
    """Starts sending and receiving; nothing is waited for.

    Two messages of one call between the same two ranks are matched in the order given, so both
    ends list them in the same order. With NCCL one call is one group operation: every call on one
    end has its counterpart at the same place in the other end's sequence of calls.

    Args:
        group: the group; None only where there is nothing to send.
        sends: contiguous tensors and the ranks in ``group`` that get them.
        receives: contiguous buffers and the ranks in ``group`` they are filled from.
        sums: notes what is sent and received.
    """
    for tensor, peer in sends:
        sums.sent(tensor, peer)
    operations = [
        dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for tensor, peer in receives
    ]
    operations += [
        dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for tensor, peer in sends
    ]
    if not operations:
        return Pending((), (), (), sums)
    works = dist.batch_isend_irecv(operations)
    return Pending(works, [operation.tensor for operation in operations], receives, sums)
