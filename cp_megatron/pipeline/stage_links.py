"""Messages between the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.comm.send_receive import Pending, post
from cp_megatron.plan.pipeline import Channel, PipelineMessage


class StageLinks:
    """The channels of this rank's stage.

    Args:
        channels: the group of each channel, whose ranks are the stages in order; none by default,
            for a pipeline of one stage.

    Attributes:
        receiving_bytes: memory of the messages that no pass has waited for yet.
    """

    def __init__(self, channels: Mapping[Channel, dist.ProcessGroup] | None = None) -> None:
        self._channels = channels or {}
        self._open: list[Pending] = []
        self._sums = {channel: LinkSums() for channel in self._channels}
        self.receiving_bytes = 0

    def connect(self, device: torch.device) -> None:
        """Connects neighbouring stages by a first message on each channel. All stages call it.

        The first message between two ranks makes their NCCL hosts wait for each other. In a step,
        where stages post their first messages at different times, they could wait in a circle.

        Args:
            device: the device of the messages.
        """
        for (kind, wraps), group in self._channels.items():
            stage, size = group.rank(), group.size()
            behind, before = (1, -1) if kind == "forward" else (-1, 1)
            ends = [(peer, (stage + peer) % size) for peer in (behind, before)]
            here = [peer for step, peer in ends if (peer != stage + step) == wraps]
            x, y = torch.zeros(2, 1, device=device)
            sends = [(x, peer) for peer in here if peer == ends[0][1]]
            receives = [(y, peer) for peer in here if peer == ends[1][1]]
            post(group, sends=sends, receives=receives, sums=LinkSums()).wait()

    def open_sums(self) -> None:
        """Starts to record checksums of all messages."""
        for sums in self._sums.values():
            sums.open()

    def corrupted(self, device: torch.device) -> list[int]:
        """The stages whose messages arrived corrupted since ``open_sums``, which this ends.

        All stages call it.

        Args:
            device: the device of the messages.
        """
        channels = self._channels.items()
        found = [self._sums[channel].close(group, device) for channel, group in channels]
        return sorted({stage for stages in found for stage in stages})

    def receive(self, message: PipelineMessage, x: Tensor) -> Arriving:
        """Starts to receive a tensor into the memory of ``x``."""
        group, sums = self._channels[message.channel], self._sums[message.channel]
        self.receiving_bytes += x.nbytes
        return Arriving(self, x, post(group, receives=[(x, message.peer)], sums=sums))

    def send(self, message: PipelineMessage, x: Tensor) -> Pending:
        """Starts to send a tensor, which must not be modified before it is sent."""
        group, sums = self._channels[message.channel], self._sums[message.channel]
        # Frees what is sent. Gloo only says so if it is waited for.
        self._open = [sent for sent in self._open if not sent.is_completed]
        sent = post(group, sends=[(x.contiguous(), message.peer)], sums=sums)
        self._open.append(sent)
        return sent

    def release(self, pending: Pending | None) -> None:
        """Frees a message that the other stage is known to have."""
        if pending is not None:
            pending.wait()
            self._open = [other for other in self._open if other is not pending]

    def settle(self) -> None:
        """Returns once everything is sent. On CUDA, the current stream waits instead."""
        for pending in self._open:
            pending.wait()
        self._open = []


class Arriving:
    """A tensor that is being received."""

    def __init__(self, links: StageLinks, x: Tensor, pending: Pending) -> None:
        self._links, self._x, self._pending = links, x, pending

    def wait(self) -> Tensor:
        """The tensor. On CUDA, the current stream waits instead of the host."""
        self._pending.wait()
        self._links.receiving_bytes -= self._x.nbytes
        return self._x
