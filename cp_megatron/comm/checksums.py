"""Sums of bits: of one tensor, and of all that went over a group's links, taken on both ends.

    rank 0                                rank 1
    sends x        s = 3 s + bits(x)      receives x      r = 3 r + bits(x)
    sends y        s = 3 s + bits(y)      receives y      r = 3 r + bits(y)
                                          s == r, else something arrived changed

A message has no sum of its own to travel with: the ends compare once, when the links are closed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Widest first: the fewer words, the faster the sum.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_ORDER = 3
"""Weighs what came before: messages that changed places change the sum. Odd, so no bit is lost."""


@torch.no_grad()
def bit_sum(x: Tensor) -> Tensor:
    """The sum of a tensor's bits as whole numbers, modulo 2**64; int64 [] on its device.

    Equal bits have equal sums, whatever the device and the place in memory. A flipped bit changes
    one word by a power of two below 2**64 and so always the sum; several changes, or two words that
    changed places, might cancel.

    Args:
        x: of any type and shape. One that is not contiguous is copied.
    """
    flat = x.detach().contiguous().view(-1)
    size = flat.numel() * flat.element_size()
    word = next(word for word in _WORDS if size % word.itemsize == 0)
    if flat.data_ptr() % word.itemsize or flat.storage_offset() * x.element_size() % word.itemsize:
        flat = flat.clone()  # a part of a message need not begin where a word does
    return flat.view(torch.uint8).view(word).sum(dtype=torch.int64)


class LinkSums:
    """What this rank sent to and received from each other rank of a group, while it is open.

    Both ends must note the messages of a link in the same order. Closed, it costs nothing.
    """

    def __init__(self) -> None:
        self._open = False
        self._sent: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}

    def open(self) -> None:
        """Starts anew."""
        self._open = True
        self._sent, self._received = {}, {}

    def sent(self, x: Tensor, peer: int) -> None:
        """Notes a message before it leaves."""
        if self._open:
            self._sent[peer] = _with(self._sent.get(peer), bit_sum(x))

    def received(self, x: Tensor, peer: int) -> None:
        """Notes a message once it is here, before anybody reads it."""
        if self._open:
            self._received[peer] = _with(self._received.get(peer), bit_sum(x))

    def gathered(self, given: Tensor, parts: Tensor, group: dist.ProcessGroup) -> None:
        """Notes an all-gather once it is over: what this rank gave, and all ranks' parts."""
        if self._open:
            bits = bit_sum(given)
            for peer, part in enumerate(parts.chunk(group.size())):
                if peer != group.rank():
                    self._sent[peer] = _with(self._sent.get(peer), bits)
                    self.received(part, peer)

    def close(self, group: dist.ProcessGroup, device: torch.device) -> list[int]:
        """The ranks of the group from which something arrived that is not what they sent.

        Called on all of them; one small message between any two.

        Args:
            group: whose links these are.
            device: for the group's messages.
        """
        self._open = False
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        ranks = range(group.size())
        sent = torch.stack([self._sent.get(rank, nothing) for rank in ranks])
        received = torch.stack([self._received.get(rank, nothing) for rank in ranks])
        said = torch.empty_like(sent)
        dist.all_to_all_single(said, sent, group=group)
        self._sent, self._received = {}, {}
        return (said != received).nonzero().flatten().tolist()


def _with(before: Tensor | None, bits: Tensor) -> Tensor:
    return bits if before is None else before * _ORDER + bits
