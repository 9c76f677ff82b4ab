"""Latent attention whose messages are latents, as one autograd function.

Shapes: those of ``latent_expansion.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.context_parallel.all_gather import gather_backward, gather_forward
from cp_megatron.context_parallel.attention_function import KeptAttention
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.context_parallel.latent_expansion import LatentExpansion
from cp_megatron.context_parallel.p2p import ring_backward, ring_forward
from cp_megatron.context_parallel.partials import Call
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.interface import BackwardInputs, Kernel, accumulation_dtype


class _LatentAttention(torch.autograd.Function):
    """Saves q, latent, rotary_key, weight, out and lse; no expanded key or value is kept.

    Backward receives the latents of other ranks again and expands each arrival again. The gradient
    of q is complete on this rank. Those of latent and rotary_key are summed over the queries of all
    ranks and over heads. The gradient of weight is this rank's share: what its own queries
    contribute, through all the keys that they read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: RankPlan,
        call: Call,
        kept: KeptAttention | None,
        q: Tensor,
        latent: Tensor,
        rotary_key: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """q [B, S, H, D], latent [B, S, L], rotary_key [B, S, R] -> [B, S, H, E] in q's type."""
        ctx.plan, ctx.call = plan, call
        if kept is not None and kept.filled:
            saved, result = kept.again(q, latent, rotary_key)
            ctx.save_for_backward(*saved, weight)
            return result
        run = gather_forward if plan.gather else ring_forward
        with plan.buffers.lend(q.device) as memory, torch.autocast(q.device.type, enabled=False):
            call = _expanding(call, q, rotary_key, weight, memory)
            # [B, S, L] and [B, S, R] as the keys and values of one head
            out, lse = run(plan, call, memory, q, latent[:, :, None], rotary_key[:, :, None])
        result = out.to(q.dtype)
        ctx.save_for_backward(q, latent, rotary_key, result, lse, weight)
        if kept is not None:
            kept.keep(3, (q, latent, rotary_key, result, lse), result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, latent, rotary_key, out, lse, weight = ctx.saved_tensors
        plan: RankPlan = ctx.plan
        run = gather_backward if plan.gather else ring_backward
        heads = latent[:, :, None], rotary_key[:, :, None]
        dweight = None
        if ctx.needs_input_grad[6]:
            dweight = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))
        with plan.buffers.lend(q.device) as memory, torch.autocast(q.device.type, enabled=False):
            call = _expanding(ctx.call, q, rotary_key, weight, memory, dweight)
            inputs = BackwardInputs(dout, q, *heads, out, lse)
            dq, dlatent, drotary = run(plan, call, memory, inputs)
        grads = dq, dlatent[:, :, 0], drotary[:, :, 0], dweight
        return None, None, None, *(None if grad is None else grad.to(q.dtype) for grad in grads)


def _expanding(
    call: Call,
    q: Tensor,
    rotary_key: Tensor,
    weight: Tensor,
    memory: Workspace,
    dweight: Tensor | None = None,
) -> Call:
    """The call with the expansion of one pass; ``dweight`` as in ``LatentExpansion``."""
    rotary_dim = rotary_key.shape[-1]
    widths = q.shape[2], q.shape[3] - rotary_dim, rotary_dim
    return replace(call, expansion=LatentExpansion(weight, *widths, memory, dweight))


def planned_latent_attention(
    plan: RankPlan,
    kernel: Kernel,
    q: Tensor,
    latent: Tensor,
    rotary_key: Tensor,
    weight: Tensor,
    scale: float,
    dropout: Dropout | None,
    kept: KeptAttention | None = None,
) -> Tensor:
    """Applies the autograd function; arguments and result are those of ``latent_attention``."""
    call = Call(kernel=kernel, scale=scale, dropout=dropout, rows=plan.rounds[0].keys)
    out: Tensor = _LatentAttention.apply(plan, call, kept, q, latent, rotary_key, weight)
    return out
