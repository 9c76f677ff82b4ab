"""Attention over a sharded sequence as one autograd function.

Shapes: B batch, S tokens of the shard, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.context_parallel.p2p import Ring, ring_backward, ring_forward


class _RingAttention(torch.autograd.Function):
    """Keeps q, k, v, out and lse of the shard; backward receives the other keys again.

    The gradient of q is this rank's alone. The gradients of k and v are summed over the queries of
    all ranks, so the objective is the sum of the ranks' losses.
    """

    @staticmethod
    def forward(ctx: Any, ring: Ring, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, S, H, D], [B, S, G, D], [B, S, G, E] -> [B, S, H, E] in q's type."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = ring_forward(ring, q, k, v, scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.scale = ring, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        """dq, dk, dv in the inputs' type."""
        q, k, v, out, lse = ctx.saved_tensors
        grads = ring_backward(ctx.ring, dout, q, k, v, out, lse, ctx.scale)
        dq, dk, dv = (grad.to(q.dtype) for grad in grads)
        return None, None, dq, dk, dv


@torch.compiler.disable
def ring_attention(ring: Ring, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The function above, opaque to torch.compile: its plan is data, not something to trace."""
    out: Tensor = _RingAttention.apply(ring, scale, q, k, v)
    return out
