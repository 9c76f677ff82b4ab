"""Attention over a sharded sequence as one autograd function.

Shapes: B batch, S tokens of the shard, H query heads, G key/value heads, D head dim, E value dim.
Where heads are traded, the rounds see M tokens of the group of traders and a share of the heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.context_parallel.a2a import Part, heads_to_tokens, tokens_to_heads
from cp_megatron.context_parallel.all_gather import gather_backward, gather_forward
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.context_parallel.p2p import ring_backward, ring_forward
from cp_megatron.context_parallel.partials import Call
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.interface import BackwardInputs, Kernel
from cp_megatron.plan.heads import HeadExchange


class KeptAttention:
    """The results of one attention, for whoever calls it again to rebuild what backward reads.

    A recomputed layer hands the same object to ``attention`` both times. The first call fills it;
    the second is given its own q, k and v again, computes nothing and sends nothing.
    """

    def __init__(self) -> None:
        self._saved: tuple[Tensor | None, ...] | None = None
        self._result: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether the first call was made."""
        return self._result is not None

    def keep(self, traded: bool, saved: tuple[Tensor, ...], result: Tensor) -> None:
        """Keeps what the first call has found.

        Args:
            traded: q, k and v came from other ranks and can not be computed again here.
            saved: q, k, v, out, lse as backward reads them.
            result: what was returned.
        """
        # Without its history: it holds this object, which would then hold itself.
        mine = (None, None, None) if not traded else tuple(x.detach() for x in saved[:3])
        self._saved = (*mine, *(x.detach() for x in saved[3:]))
        self._result = result.detach()

    def again(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What backward reads, from the inputs of the second call, and what to return."""
        assert self._saved is not None
        assert self._result is not None
        saved = tuple(own if x is None else x for x, own in zip(self._saved, (q, k, v, None, None)))
        return cast("tuple[Tensor, ...]", saved), self._result.detach()


class _Attention(torch.autograd.Function):
    """Keeps what this rank computed with: q, k, v, out and lse of its tokens and heads.

    Keys of other ranks are received again in backward. The gradient of q is this rank's alone. The
    gradients of k and v are summed over the queries of all ranks, in float32 (float64 for float64),
    so the objective is the sum of the ranks' losses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: RankPlan,
        call: Call,
        kept: KeptAttention | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """[B, S, H, D], [B, S, G, D], [B, S, G, E] -> [B, S, H, E] in q's type."""
        ctx.plan, ctx.call = plan, call
        if kept is not None and kept.filled:
            saved, result = kept.again(q, k, v)
            ctx.save_for_backward(*saved)
            return result
        trade = plan.trade
        run = gather_forward if plan.gather else ring_forward
        # Types are the engine's business: sums are float32 whatever autocast would like.
        no_autocast = torch.autocast(q.device.type, enabled=False)
        with plan.buffers.lend(q.device) as memory, no_autocast:
            if trade:
                heads, kv_heads = trade.query_heads, trade.kv_heads
                parts = [Part(q, heads), Part(k, kv_heads), Part(v, kv_heads)]
                q, k, v = tokens_to_heads(trade, plan.group, memory, plan.link_sums, parts)
            out, lse = run(plan, call, memory, q, k, v)
            out = result = out.to(q.dtype)
            if trade:
                part = Part(out, trade.query_heads)
                (result,) = heads_to_tokens(trade, plan.group, memory, plan.link_sums, [part])
        ctx.save_for_backward(q, k, v, out, lse)
        if kept is not None:
            kept.keep(trade is not None, (q, k, v, out, lse), result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, None, None, Tensor, Tensor, Tensor]:
        """dq, dk, dv in the inputs' type."""
        q, k, v, out, lse = ctx.saved_tensors
        plan: RankPlan = ctx.plan
        trade = plan.trade
        run = gather_backward if plan.gather else ring_backward
        no_autocast = torch.autocast(q.device.type, enabled=False)
        with plan.buffers.lend(q.device) as memory, no_autocast:
            if trade:
                part = Part(dout, trade.query_heads)
                (dout,) = tokens_to_heads(trade, plan.group, memory, plan.link_sums, [part])
            grads = run(plan, ctx.call, memory, BackwardInputs(dout, q, k, v, out, lse))
            if trade:
                grads = _return_gradients(plan, trade, memory, grads, q.dtype)
        dq, dk, dv = (grad.to(q.dtype) for grad in grads)
        return None, None, None, dq, dk, dv


def _return_gradients(
    plan: RankPlan,
    trade: HeadExchange,
    memory: Workspace,
    grads: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's tokens from those of its heads.

    Key/value heads that several ranks computed come back as a sum and are rounded after it;
    everything else is rounded before it travels.
    """
    dq, dk, dv = (Part(grads[0].to(dtype), trade.query_heads), *_key_parts(trade, grads, dtype))
    if dq.tensor.dtype == dk.tensor.dtype:
        queries, keys, values = heads_to_tokens(
            trade, plan.group, memory, plan.link_sums, [dq, dk, dv]
        )
    else:
        (queries,) = heads_to_tokens(trade, plan.group, memory, plan.link_sums, [dq])
        keys, values = heads_to_tokens(trade, plan.group, memory, plan.link_sums, [dk, dv])
    return queries, keys, values


def _key_parts(
    trade: HeadExchange, grads: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> list[Part]:
    spans = trade.kv_heads
    shared = sum(stop - start for start, stop in spans) > spans[-1][1]
    return [Part(grad if shared else grad.to(dtype), spans) for grad in grads[1:]]


def planned_attention(
    plan: RankPlan,
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout: Dropout | None,
    kept: KeptAttention | None = None,
) -> Tensor:
    """The function above.

    Args:
        plan: this rank's part of a schedule for these heads.
        kernel: computes its tiles.
        q, k, v: [B, S, H, D], [B, S, G, D] and [B, S, G, E], contiguous.
        scale: what scores are multiplied with.
        dropout: of attention weights; its ``head0`` is this rank's first head before any trade.
        kept: where the results are kept for a second call.

    Returns:
        [B, S, H, E] in q's type.
    """
    if dropout and plan.trade:
        first = plan.trade.query_heads[plan.trade.index][0]
        dropout = replace(dropout, head0=dropout.head0 + first)
    rows = plan.rounds[0].keys
    call = Call(kernel=kernel, scale=scale, dropout=dropout, rows=rows)
    out: Tensor = _Attention.apply(plan, call, kept, q, k, v)
    return out
