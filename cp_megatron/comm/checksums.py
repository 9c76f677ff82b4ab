"""Checksums: of one tensor, and of all messages over a group's links, computed on both ends.

    rank 0                                rank 1
    sends x        s = 3 s + bits(x)      receives x      r = 3 r + bits(x)
    sends y        s = 3 s + bits(y)      receives y      r = 3 r + bits(y)
                                          s == r, otherwise a message was corrupted

Messages do not carry checksums. The ends compare their sums once, when the links are closed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Widest first, because a sum over fewer words is faster.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_ORDER = 3
"""The weight of earlier messages makes swapped messages change the sum; it is odd to keep all bits.
"""


@torch.no_grad()
def bit_sum(x: Tensor) -> Tensor:
    """Sums a tensor's bits as integers, modulo 2**64. Returns int64 [] on its device.

    Equal bits have equal sums on every device and at every place in memory. A flipped bit changes
    one word by a power of two below 2**64, so it always changes the sum. Several changes, or two
    swapped words, may cancel.

    Args:
        x: of any type and shape. A tensor that is not contiguous is copied.
    """
    flat = x.detach().contiguous().view(-1)
    size = flat.numel() * flat.element_size()
    word = next(word for word in _WORDS if size % word.itemsize == 0)
    if flat.data_ptr() % word.itemsize or flat.storage_offset() * x.element_size() % word.itemsize:
        flat = flat.clone()  # a part of a message may start inside a word
    return flat.view(torch.uint8).view(word).sum(dtype=torch.int64)


class LinkSums:
    """Checksums of what this rank exchanges with each other rank of a group, while it is open.

    Both ends must record the messages of a link in the same order. A closed object costs nothing.
    """

    def __init__(self) -> None:
        self._open = False
        self._sent: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}

    def open(self) -> None:
        """Starts recording, without what was recorded before."""
        self._open = True
        self._sent, self._received = {}, {}

    def sent(self, x: Tensor, peer: int) -> None:
        """Records a message before it is sent."""
        if self._open:
            self._sent[peer] = _with(self._sent.get(peer), bit_sum(x))

    def received(self, x: Tensor, peer: int) -> None:
        """Records a message after it has arrived, before it is read."""
        if self._open:
            self._received[peer] = _with(self._received.get(peer), bit_sum(x))

    def gathered(self, given: Tensor, parts: Tensor, group: dist.ProcessGroup) -> None:
        """Records a completed all-gather: this rank's input and the parts of all ranks."""
        if self._open:
            bits = bit_sum(given)
            for peer, part in enumerate(parts.chunk(group.size())):
                if peer != group.rank():
                    self._sent[peer] = _with(self._sent.get(peer), bits)
                    self.received(part, peer)

    def close(self, group: dist.ProcessGroup, device: torch.device) -> list[int]:
        """Returns the ranks of the group whose messages arrived corrupted.

        All ranks of the group call it. Any two of them exchange one small message.

        Args:
            group: the group of the recorded links.
            device: the device of the group's messages.
        """
        self._open = False
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        ranks = range(group.size())
        sent = torch.stack([self._sent.get(rank, nothing) for rank in ranks])
        received = torch.stack([self._received.get(rank, nothing) for rank in ranks])
        expected = torch.empty_like(sent)
        dist.all_to_all_single(expected, sent, group=group)
        self._sent, self._received = {}, {}
        return (expected != received).nonzero().flatten().tolist()


def _with(before: Tensor | None, bits: Tensor) -> Tensor:
    return bits if before is None else before * _ORDER + bits
