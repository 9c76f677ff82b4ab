"""Attention over a sharded sequence as one autograd function.

Shapes: B = batch, S = tokens of the shard, H = query heads, G = key/value heads, D = head dim,
E = value head dim. If heads are exchanged by all-to-all, the rounds compute some of the heads for
the M tokens of all peers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.context_parallel.a2a import HeadAllToAll, PartitionedHeads
from cp_megatron.context_parallel.all_gather import gather_backward, gather_forward
from cp_megatron.context_parallel.p2p import ring_backward, ring_forward
from cp_megatron.context_parallel.partials import Call
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.interface import BackwardInputs, Kernel


class KeptAttention:
    """The results of one attention, kept for a second call that rebuilds what backward reads.

    A recomputed layer passes the same object to ``attention`` twice. The first call fills it. The
    second call receives its own q, k and v, computes nothing and sends nothing.
    """

    def __init__(self) -> None:
        self._saved: tuple[Tensor | None, ...] | None = None
        self._result: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether the first call was made."""
        return self._result is not None

    def keep(self, heads_exchanged: bool, saved: tuple[Tensor, ...], result: Tensor) -> None:
        """Keeps q, k, v, out and lse as backward reads them, and the result of the first call.

        If heads were exchanged, q, k and v came from other ranks, and the second call cannot
        provide them.
        """
        # The history of the tensors refers to this object, which would then refer to itself.
        inputs = tuple(x.detach() for x in saved[:3]) if heads_exchanged else (None, None, None)
        self._saved = (*inputs, *(x.detach() for x in saved[3:]))
        self._result = result.detach()

    def again(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns the tensors that backward reads and the return value of the second call."""
        assert self._saved is not None
        assert self._result is not None
        saved = tuple(own if x is None else x for x, own in zip(self._saved, (q, k, v, None, None)))
        return cast("tuple[Tensor, ...]", saved), self._result.detach()


class _Attention(torch.autograd.Function):
    """Saves q, k, v, out and lse of the tokens and heads that this rank computes.

    Backward receives the keys of other ranks again. The gradient of q is complete on this rank. The
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
        exchange = plan.head_exchange
        run = gather_forward if plan.gather else ring_forward
        # The engine sums in float32 on its own, so autocast must not change types.
        no_autocast = torch.autocast(q.device.type, enabled=False)
        with plan.buffers.lend(q.device) as memory, no_autocast:
            if exchange:
                all_to_all = HeadAllToAll(exchange, plan.group, memory, plan.link_sums)
                heads = exchange.query_heads, exchange.kv_heads, exchange.kv_heads
                q, k, v = all_to_all.to_heads(list(map(PartitionedHeads, (q, k, v), heads)))
            out, lse = run(plan, call, memory, q, k, v)
            out = result = out.to(q.dtype)
            if exchange:
                (result,) = all_to_all.to_tokens([PartitionedHeads(out, exchange.query_heads)])
        ctx.save_for_backward(q, k, v, out, lse)
        if kept is not None:
            kept.keep(exchange is not None, (q, k, v, out, lse), result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, None, None, Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        plan: RankPlan = ctx.plan
        exchange = plan.head_exchange
        run = gather_backward if plan.gather else ring_backward
        no_autocast = torch.autocast(q.device.type, enabled=False)
        with plan.buffers.lend(q.device) as memory, no_autocast:
            if exchange:
                all_to_all = HeadAllToAll(exchange, plan.group, memory, plan.link_sums)
                (dout,) = all_to_all.to_heads([PartitionedHeads(dout, exchange.query_heads)])
            grads = run(plan, ctx.call, memory, BackwardInputs(dout, q, k, v, out, lse))
            if exchange:
                grads = _return_gradients(all_to_all, grads, q.dtype)
        dq, dk, dv = (grad.to(q.dtype) for grad in grads)
        return None, None, None, dq, dk, dv


def _return_gradients(
    all_to_all: HeadAllToAll, grads: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of this rank's tokens, given those of its heads.

    Key/value heads that several ranks computed come back as a sum and are rounded after it. All
    other gradients are rounded before they are sent.
    """
    exchange = all_to_all.exchange
    dq, dk, dv = grads
    if not exchange.repeats_kv_heads:
        dk, dv = dk.to(dtype), dv.to(dtype)
    queries = [PartitionedHeads(dq.to(dtype), exchange.query_heads)]
    keys = [PartitionedHeads(grad, exchange.kv_heads) for grad in (dk, dv)]
    groups = [queries + keys] if dk.dtype == dtype else [queries, keys]
    dq, dk, dv = (grad for parts in groups for grad in all_to_all.to_tokens(parts))
    return dq, dk, dv


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
    """Applies the autograd function; arguments and result are those of ``attention``.

    The ``head0`` of ``dropout`` is this rank's first head before any all-to-all.
    """
    exchange = plan.head_exchange
    if dropout and exchange:
        first = exchange.query_heads[exchange.index][0]
        dropout = replace(dropout, head0=dropout.head0 + first)
    rows = plan.rounds[0].keys
    call = Call(kernel=kernel, scale=scale, dropout=dropout, rows=rows)
    out: Tensor = _Attention.apply(plan, call, kept, q, k, v)
    return out
