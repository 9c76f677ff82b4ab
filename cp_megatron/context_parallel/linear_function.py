"""A linear recurrence over a sharded sequence as one autograd function.

``plan/states.py`` explains what crosses ranks, ``kernels/linear_interface.py`` what a kernel
computes between the messages. Only the inputs, the states that enter pieces and the transitions of
this rank's share of the heads are kept for backward.

Shapes: B batch, S tokens of the shard, G key heads, H value heads, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.context_parallel.attention_function import KeptAttention
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.context_parallel.received import Received
from cp_megatron.context_parallel.state_exchange import StateExchange
from cp_megatron.kernels.linear_interface import LinearInputs, LinearKernel, LinearSummary
from cp_megatron.kernels.load_kernel import load_linear_kernel
from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.states import StatePlan


class LinearPlan:
    """The part of one rank in a ``StatePlan``, and the group that it exchanges messages with."""

    def __init__(
        self,
        mask: Mask,
        layout: SequenceLayout,
        num_heads: int,
        rank: int,
        group: dist.ProcessGroup | None,
        buffers: Buffers,
        sums: LinkSums,
    ) -> None:
        self.plan = StatePlan.of(mask, layout, num_heads)
        self.mask, self.rank, self.group = mask, rank, group
        self.buffers, self.sums = buffers, sums
        self._kernels: dict[tuple[str, torch.device], LinearKernel] = {}

    def kernel(self, name: str, device: torch.device) -> LinearKernel:
        """Returns the kernel of this rank's pieces on a device, made once.

        Args:
            name: as ``select_linear_kernel`` chose it.
            device: where the tokens are.
        """
        key = name, device
        if key not in self._kernels:
            pieces = [piece for piece in self.plan.pieces if piece.rank == self.rank]
            self._kernels[key] = load_linear_kernel(name, self.mask, pieces, device)
        return self._kernels[key]


@dataclass(frozen=True)
class _Call:
    """One recurrence: who computes it, and who sends what to whom."""

    plan: LinearPlan
    kernel: LinearKernel
    scale: float

    def enter(self, summary: LinearSummary) -> tuple[Tensor | None, Tensor | None]:
        """Returns the states that enter pieces, [B, i, H, D, E], and the chained transitions; None
        if no rank has a chain."""
        plan = self.plan
        if not plan.plan.chains:
            return None, None
        with plan.buffers.lend(summary.increments.device) as memory:
            exchange = StateExchange(plan.plan, plan.rank, plan.group, memory, plan.sums)
            return exchange.entering_states(summary.increments, summary.transitions)

    def leave(self, own: Tensor, chained: Tensor) -> Tensor:
        """Returns the gradients of the states that leave pieces, [B, o, H, D, E]."""
        plan = self.plan
        with plan.buffers.lend(own.device) as memory:
            exchange = StateExchange(plan.plan, plan.rank, plan.group, memory, plan.sums)
            return exchange.leaving_gradients(own, chained)


class _LinearAttention(torch.autograd.Function):
    """Saves q, k, v, g, beta, the states that enter pieces, and the chained transitions.

    All sums are float32 (float64 for float64). Gradients are complete on this rank: what a token
    adds to outputs of other ranks arrives as the gradient of the state that leaves its piece.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        kept: KeptAttention | Received | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
    ) -> Tensor:
        """Returns [B, S, H, E] in v's type; the inputs are those of ``linear_attention``."""
        ctx.call = call
        given = (q, k, v, g, beta)
        if isinstance(kept, KeptAttention) and kept.filled:
            saved, result = kept.again(*given)
            ctx.save_for_backward(*saved)
            return result
        with torch.autocast(q.device.type, enabled=False):
            x = LinearInputs(*given, call.scale)
            summary = call.kernel.summarize(x)
            received = kept if isinstance(kept, Received) else Received()
            entering, chained = received.once(lambda: call.enter(summary))
            result = call.kernel.apply(x, summary, entering)
        saved = (*given, entering, chained)
        ctx.save_for_backward(*saved)
        if isinstance(kept, KeptAttention):
            kept.keep(len(given), saved, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *given, entering, chained = ctx.saved_tensors
        call: _Call = ctx.call
        with torch.autocast(dout.device.type, enabled=False):
            q, k, v, g, beta = given
            x, leaving = LinearInputs(q, k, v, g, beta, call.scale), None
            if chained is not None:
                leaving = call.leave(call.kernel.adjoint(x, dout), chained)
            grads = call.kernel.backward(x, dout, entering, leaving)
        return None, None, *grads, *[None] * (len(given) - len(grads))


def planned_linear_attention(
    plan: LinearPlan,
    kernel: LinearKernel,
    x: LinearInputs,
    kept: KeptAttention | Received | None = None,
) -> Tensor:
    """Applies the autograd function; arguments and result are those of ``linear_attention``."""
    call = _Call(plan, kernel, x.scale)
    out: Tensor = _LinearAttention.apply(call, kept, *x[:5])
    return out
