"""A short causal convolution over a sharded sequence; ``plan/halo.py`` plans its messages.

Shapes: B batch, S tokens of the shard, c channels, W width, n tokens that are received.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.comm.send_receive import post
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.halo import Halo, plan_halos
from cp_megatron.plan.states import StatePlan

SENT, RECEIVED = "keys 0", "keys 1"


@dataclass(frozen=True)
class HaloExchange:
    """One rank's part of the convolution.

    Attributes:
        halo: what this rank sends and receives.
        taps: int64 [W, S]: the place of the token j places before each token, among this rank's
            tokens and then those it receives; -1 if it is not in the token's document.
        group: the context parallel group; None is one rank.
        buffers, sums: the memory of the messages, and their checksums.
    """

    halo: Halo
    taps: np.ndarray[Any, np.dtype[np.int64]]
    group: dist.ProcessGroup | None
    buffers: Buffers
    sums: LinkSums

    @classmethod
    def of(
        cls,
        mask: Mask,
        layout: SequenceLayout,
        width: int,
        rank: int,
        group: dist.ProcessGroup | None,
        buffers: Buffers,
        sums: LinkSums,
    ) -> HaloExchange:
        """Plans the messages of a convolution over ``width`` tokens."""
        plan = StatePlan.of(mask, layout, 1)
        halo = plan_halos(mask, layout, plan, width)[rank]
        own = layout.positions(rank)
        known = np.concatenate([own, halo.received])
        order = np.argsort(known)
        starts = mask.starts[np.searchsorted(mask.starts, own, side="right") - 1]
        wanted = own[None, :] - np.arange(width)[:, None]
        found = order[np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)]
        return cls(halo, np.where(wanted < starts, -1, found), group, buffers, sums)

    @cached_property
    def moves(self) -> bool:
        """Whether this rank sends or receives anything."""
        return bool(len(self.halo.received)) or any(map(len, self.halo.send))

    def fetch(self, x: Tensor) -> Tensor:
        """[B, S, c] -> the tokens of other ranks that this one reads, [B, n, c]."""
        result = x.new_empty((x.shape[0], len(self.halo.received), x.shape[2]))
        if not self.moves:
            return result
        sends = [torch.from_numpy(places).to(x.device) for places in self.halo.send]
        with self.buffers.lend(x.device) as memory:
            sent = memory.take(SENT, (sum(map(len, sends)), x.shape[0], x.shape[2]), x.dtype)
            received = memory.take(RECEIVED, (result.shape[1], *sent.shape[1:]), x.dtype)
            outgoing = sent.split([len(places) for places in sends])
            for message, places in zip(outgoing, sends):
                message.copy_(x[:, places].transpose(0, 1))
            self._send(outgoing, received.split(self.halo.num_received))
            result.copy_(received.transpose(0, 1))
        return result

    def give_back_(self, grad: Tensor, received: Tensor) -> None:
        """Adds to ``grad`` [B, S, c] what other ranks computed for the tokens they read.

        Args:
            grad: of this rank's tokens.
            received: of the tokens that it read, [B, n, c].
        """
        if not self.moves:
            return
        sends = [torch.from_numpy(places).to(grad.device) for places in self.halo.send]
        shape = grad.shape[0], grad.shape[2]
        with self.buffers.lend(grad.device) as memory:
            sent = memory.take(SENT, (received.shape[1], *shape), grad.dtype)
            sent.copy_(received.transpose(0, 1))
            back = memory.take(RECEIVED, (sum(map(len, sends)), *shape), grad.dtype)
            incoming = back.split([len(places) for places in sends])
            self._send(sent.split(self.halo.num_received), incoming)
            for message, places in zip(incoming, sends):
                grad.index_add_(1, places, message.transpose(0, 1))

    def _send(self, outgoing: Any, incoming: Any) -> None:
        post(
            self.group,
            sends=[(x, peer) for peer, x in enumerate(outgoing) if len(x)],
            receives=[(x, peer) for peer, x in enumerate(incoming) if len(x)],
            sums=self.sums,
        ).wait()


class _ShortConvolution(torch.autograd.Function):
    """Saves x, what was received, and the weight.

    The gradient of x is complete on this rank; those of weight and bias are this rank's share of a
    sum over the group.
    """

    @staticmethod
    def forward(
        ctx: Any, exchange: HaloExchange, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.exchange, ctx.has_bias = exchange, bias is not None
        received = exchange.fetch(x)
        ctx.save_for_backward(x, received, weight)
        taps = torch.from_numpy(exchange.taps).to(x.device)
        known = torch.cat((x, received), dim=1)
        out = torch.zeros_like(x)
        for j, places in enumerate(taps):
            out.addcmul_(_read(known, places), weight[:, weight.shape[1] - 1 - j])
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, received, weight = ctx.saved_tensors
        exchange: HaloExchange = ctx.exchange
        taps = torch.from_numpy(exchange.taps).to(x.device)
        known, width = torch.cat((x, received), dim=1), weight.shape[1]
        dknown, dweight = torch.zeros_like(known), torch.empty_like(weight)
        for j, places in enumerate(taps):
            column = width - 1 - j
            dweight[:, column] = (dout * _read(known, places)).sum((0, 1))
            inside = (places >= 0)[:, None]
            dknown.index_add_(1, places.clamp(min=0), dout * weight[:, column] * inside)
        dx, dreceived = dknown.split((x.shape[1], received.shape[1]), dim=1)
        dx = dx.contiguous()
        exchange.give_back_(dx, dreceived)
        return None, dx, dweight, dout.sum((0, 1)) if ctx.has_bias else None


def _read(known: Tensor, places: Tensor) -> Tensor:
    """Tokens ``places`` of [B, S + n, c], zero where there is none: [B, S, c]."""
    return known[:, places.clamp(min=0)] * (places >= 0)[:, None]


def short_convolution(
    exchange: HaloExchange, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """y_t = sum over j < W of weight[:, W - 1 - j] x_(t-j), per channel and within documents.

    Args:
        exchange: this rank's part.
        x: [B, S, c].
        weight: [c, W]; the last column multiplies the token itself, as in ``torch.nn.Conv1d``.
        bias: [c].
    """
    out: Tensor = _ShortConvolution.apply(exchange, x, weight, bias)
    return out
