"""A short causal convolution over a sharded sequence; ``plan/halo.py`` plans its messages.

Shapes: B batch, S tokens of the shard, c channels, W width, n tokens that are received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.comm.host_copies import to_device
from cp_megatron.comm.send_receive import post
from cp_megatron.comm.trace import waiting_for
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.context_parallel.received import Received
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.buffer_sizes import RECEIVED_HEADS, SENT_HEADS
from cp_megatron.plan.halo import plan_halos
from cp_megatron.plan.states import StatePlan


class HaloExchange:
    """One rank's part of a convolution, and the group that it exchanges messages with.

    Args:
        mask, layout: the documents, and which rank holds which tokens.
        width: tokens that the convolution reads, W.
        rank: this rank.
        group: the context parallel group; None is one rank.
        buffers, sums: the memory of the messages, and their checksums.

    Raises:
        ConfigError: the mask is not causal or has a window.
    """

    def __init__(
        self,
        mask: Mask,
        layout: SequenceLayout,
        width: int,
        rank: int,
        group: dist.ProcessGroup | None,
        buffers: Buffers,
        sums: LinkSums,
    ) -> None:
        self.group, self.buffers, self.sums = group, buffers, sums
        plan = StatePlan.of(mask, layout, 1)
        self.halo = plan_halos(mask, layout, plan, width)[rank]
        self.moves = bool(len(self.halo.received)) or any(map(len, self.halo.send))
        own = layout.positions(rank)
        known = np.concatenate([own, self.halo.received])
        order = np.argsort(known)
        starts = mask.starts[np.searchsorted(mask.starts, own, side="right") - 1]
        wanted = own[None, :] - np.arange(width)[:, None]
        found = order[np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)]
        self._taps = np.where(wanted < starts, len(known), found)
        self._on: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Returns two indices on a device, copied there once.

        Returns:
            int64 [W, S], the place of the token j places before each token, among this rank's
            tokens and then those it receives, or after them if it is not in the token's document;
            and for each rank, the places of the tokens that this one sends.
        """
        if device not in self._on:
            sends = [to_device(torch.from_numpy(x), device) for x in self.halo.send]
            self._on[device] = to_device(torch.from_numpy(self._taps), device), sends
        return self._on[device]

    def fetch(self, x: Tensor) -> Tensor:
        """Returns the tokens of other ranks that this one reads: [B, S, c] -> [B, n, c]."""
        result = x.new_empty((x.shape[0], len(self.halo.received), x.shape[2]))
        if not self.moves:
            return result
        _, sends = self.on(x.device)
        shape = x.shape[0], x.shape[2]
        with self.buffers.lend(x.device) as memory:
            sent = memory.take(SENT_HEADS, (sum(map(len, sends)), *shape), x.dtype)
            received = memory.take(RECEIVED_HEADS, (result.shape[1], *shape), x.dtype)
            outgoing = sent.split([len(places) for places in sends])
            for message, places in zip(outgoing, sends):
                message.copy_(x[:, places].transpose(0, 1))
            self._send(outgoing, received.split(self.halo.num_received))
            result.copy_(received.transpose(0, 1))
        return result

    def give_back_(self, grad: Tensor, received: Tensor) -> None:
        """Adds to ``grad`` [B, S, c] what other ranks computed for the tokens they read.

        Args:
            grad: the gradient of this rank's tokens.
            received: the gradient of the tokens that it read, [B, n, c].
        """
        if not self.moves:
            return
        _, sends = self.on(grad.device)
        shape = grad.shape[0], grad.shape[2]
        with self.buffers.lend(grad.device) as memory:
            sent = memory.take(SENT_HEADS, (received.shape[1], *shape), grad.dtype)
            sent.copy_(received.transpose(0, 1))
            back = memory.take(RECEIVED_HEADS, (sum(map(len, sends)), *shape), grad.dtype)
            incoming = back.split([len(places) for places in sends])
            self._send(sent.split(self.halo.num_received), incoming)
            for message, places in zip(incoming, sends):
                grad.index_add_(1, places, message.transpose(0, 1))

    def _send(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """Sends a message to every rank and receives one from each; empty ones do not travel."""
        pending = post(
            self.group,
            sends=[(x, peer) for peer, x in enumerate(outgoing) if len(x)],
            receives=[(x, peer) for peer, x in enumerate(incoming) if len(x)],
            sums=self.sums,
        )
        with waiting_for("tokens of a convolution"):
            pending.wait()


class _ShortConvolution(torch.autograd.Function):
    """Saves x, what was received, and the weight. Sums are float32 (float64 for float64).

    The gradient of x is complete on this rank; those of weight and bias are this rank's share of a
    sum over the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        exchange: HaloExchange,
        kept: Received,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.exchange, ctx.has_bias = exchange, bias is not None
        (received,) = kept.once(lambda: (exchange.fetch(x),))
        ctx.save_for_backward(x, received, weight)
        taps, _ = exchange.on(x.device)
        known, exact = _known(x, received), accumulation_dtype(x.dtype)
        out = torch.zeros_like(x, dtype=exact)
        for j, places in enumerate(taps):
            out.addcmul_(known[:, places], weight[:, weight.shape[1] - 1 - j])
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, received, weight = ctx.saved_tensors
        exchange: HaloExchange = ctx.exchange
        taps, _ = exchange.on(x.device)
        known, width = _known(x, received), weight.shape[1]
        exact = accumulation_dtype(x.dtype)
        dknown, dweight = torch.zeros_like(known, dtype=exact), torch.empty_like(weight)
        for j, places in enumerate(taps):
            column = width - 1 - j
            dweight[:, column] = (dout * known[:, places]).sum((0, 1), dtype=exact)
            dknown.index_add_(1, places, dout * weight[:, column].to(exact))
        dx, dreceived, _ = dknown.to(x.dtype).split((x.shape[1], received.shape[1], 1), dim=1)
        dx = dx.contiguous()
        exchange.give_back_(dx, dreceived)
        dbias = dout.sum((0, 1), dtype=exact).to(dout.dtype) if ctx.has_bias else None
        return None, None, dx, dweight, dbias


def _known(x: Tensor, received: Tensor) -> Tensor:
    """Joins this rank's tokens, those it received, and a 0 for what is in no document of the
    reader: [B, S + n + 1, c]."""
    return torch.cat((x, received, x.new_zeros((x.shape[0], 1, x.shape[2]))), dim=1)


def short_convolution(
    exchange: HaloExchange,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Received | None = None,
) -> Tensor:
    """y_t = sum over j < W of weight[:, W - 1 - j] x_(t-j), per channel and within documents.

    Args:
        exchange: this rank's part.
        x: [B, S, c].
        weight: [c, W]; the last column multiplies the token itself, as in ``torch.nn.Conv1d``.
        bias: [c].
        kept: passed twice, for recomputation; the second call sends nothing.
    """
    out: Tensor = _ShortConvolution.apply(exchange, kept or Received(), x, weight, bias)
    return out
