"""Messages between ranks of a group, with checksums: point to point, or all to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.checksums import LinkSums


@dataclass(frozen=True)
class Pending:
    """Messages in flight. Their tensors must not be modified before ``wait`` returns.

    ``buffers`` keeps their memory alive until then.
    """

    works: Sequence[dist.Work]
    buffers: Sequence[Tensor]
    receives: Sequence[tuple[Tensor, int]]
    sums: LinkSums

    @property
    def is_completed(self) -> bool:
        """Whether everything that was posted has been sent and received, without waiting."""
        return all(work.is_completed() for work in self.works)

    def wait(self) -> None:
        """Returns once everything that was posted has been sent and received.

        On CUDA, the current stream waits instead of the host.
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
    """Starts sending and receiving without waiting.

    Two messages of one call between the same two ranks are matched in order, so both ends list them
    in the same order. With NCCL, one call is one group operation: every call on one end has its
    counterpart at the same place in the other end's sequence of calls.

    Args:
        group: the group; may be None if there are no messages.
        sends: contiguous tensors and the ranks in ``group`` that receive them.
        receives: contiguous buffers and the ranks in ``group`` that fill them.
        sums: checksums of what is sent and received.
    """
    for tensor, peer in sends:
        sums.sent(tensor, peer)
    operations = [
        dist.P2POp(operation, tensor, group=group, group_peer=peer)
        for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
        for tensor, peer in messages
    ]
    if not operations:
        return Pending((), (), (), sums)
    works = dist.batch_isend_irecv(operations)
    return Pending(works, [operation.tensor for operation in operations], receives, sums)


def all_to_all(
    group: dist.ProcessGroup,
    sent: Tensor,
    received: Tensor,
    sizes: tuple[Sequence[int], Sequence[int]],
    sums: LinkSums,
) -> None:
    """Sends a part of one buffer to every rank of the group, and receives a part from each.

    Args:
        group: the ranks.
        sent, received: contiguous, 1-D, the ranks' parts one after the other.
        sizes: the elements of each part of ``sent``, and of each part of ``received``.
        sums: checksums of what is sent and received; a rank's own part is not a message.
    """
    rank, (counts, expected) = group.rank(), sizes
    for peer, part in enumerate(sent.split(list(counts))):
        if peer != rank:
            sums.sent(part, peer)
    dist.all_to_all_single(received, sent, list(expected), list(counts), group=group)
    for peer, part in enumerate(received.split(list(expected))):
        if peer != rank:
            sums.received(part, peer)
