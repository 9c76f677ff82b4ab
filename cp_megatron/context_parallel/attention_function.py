"""Attention over a sharded sequence as one autograd function.

Shapes: B = batch, S = tokens of the shard, H = query heads, G = key/value heads, D = head dim,
E = value head dim. If heads are exchanged by all-to-all, the rounds compute some of the heads for
the M tokens of all peers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.context_parallel.a2a import HeadAllToAll, PartitionedHeads
from cp_megatron.context_parallel.all_gather import gather_backward, gather_forward
from cp_megatron.context_parallel.p2p import ring_backward, ring_forward
from cp_megatron.context_parallel.partials import Call
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.context_parallel.sinks import add_sinks_, sink_gradient
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.interface import BackwardInputs, Kernel, accumulation_dtype


class KeptAttention:
    """The results of one attention, kept for a second call that rebuilds what backward reads.

    A recomputed layer passes the same object to ``attention`` twice. The first call fills it. The
    second call receives its own inputs, computes nothing and sends nothing.

    Args:
        pack: turns each tensor into what is kept in its place; by default the tensor itself.
        unpack: turns that back into the tensor.
    """

    def __init__(
        self,
        pack: Callable[[Tensor], object] | None = None,
        unpack: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self._pack, self._unpack = pack or _same, unpack or _same
        self._kept: dict[int, Any] = {}
        self._saved: tuple[int | None, ...] = ()
        self._results: tuple[int, ...] | None = None
        self._num_given = 0

    @property
    def filled(self) -> bool:
        """Whether the first call was made."""
        return self._results is not None

    def keep(self, num_given: int, saved: Sequence[Tensor | None], *results: Tensor) -> None:
        """Keeps what backward reads, and the results of the first call.

        Args:
            num_given: how many of the saved tensors, the first ones, the second call will give.
                0 if heads were exchanged: then they came from other ranks.
            saved: what backward reads.
            results: what the first call returned.
        """
        tensors = {id(x): x for x in (*saved[num_given:], *results) if x is not None}
        # The history of the tensors refers to this object, which would then refer to itself.
        self._kept = {key: self._pack(x.detach()) for key, x in tensors.items()}
        self._saved = tuple(None if x is None else id(x) for x in saved[num_given:])
        self._results = tuple(map(id, results))
        self._num_given = num_given

    def again(self, *given: Tensor | None) -> tuple[Any, ...]:
        """Returns the tuple of tensors that backward reads, then each result of the second call."""
        assert self._results is not None
        kept = {key: self._unpack(x) for key, x in self._kept.items()}
        saved = (None if key is None else kept[key] for key in self._saved)
        results = (kept[key].detach() for key in self._results)
        return (*given[: self._num_given], *saved), *results


def _same(x: Tensor) -> Tensor:
    return x


class _Attention(torch.autograd.Function):
    """Saves q, k, v, out and lse of the tokens and heads that this rank computes, and the sinks.

    Backward receives the keys of other ranks again. The gradient of q is complete on this rank. The
    gradients of k and v are summed over the queries of all ranks, in float32 (float64 for float64),
    so the objective is the sum of the ranks' losses. The gradient of the sinks is this rank's share
    of a sum over ranks, as that of a parameter. The lse can be differentiated too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: RankPlan,
        call: Call,
        kept: KeptAttention | None,
        returns_lse: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor | tuple[Tensor, ...]:
        """q [B, S, H, D], k [B, S, G, D], v [B, S, G, E], sinks [H] -> out, or (out, lse).

        out is [B, S, H, E] in q's type, lse [B, H, S] in float32 (float64 for float64).
        """
        ctx.plan, ctx.call, ctx.returns_lse = plan, call, returns_lse
        ctx.set_materialize_grads(False)
        if kept is not None and kept.filled:
            saved, *results = kept.again(q, k, v)
        else:
            saved, results = _compute(plan, call, (q, k, v), sinks, returns_lse=returns_lse)
            if kept is not None:
                kept.keep(0 if plan.head_exchange else 3, saved, *results)
        ctx.shape = results[0].shape
        ctx.save_for_backward(*saved, sinks)
        return tuple(results) if returns_lse else results[0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        plan: RankPlan = ctx.plan
        exchange = plan.head_exchange
        run = gather_backward if plan.gather else ring_backward
        no_autocast = torch.autocast(q.device.type, enabled=False)
        with plan.buffers.lend(q.device) as memory, no_autocast:
            if exchange:
                all_to_all = HeadAllToAll(exchange, plan.group, memory, plan.link_sums)
                whole = out.new_zeros(ctx.shape) if dout is None else dout
                dout, dlse = _exchange_gradients(
                    all_to_all, whole, dlse, lse, returned_lse=ctx.returns_lse
                )
            if dout is None:
                dout = torch.zeros_like(out)
            x = BackwardInputs(dout, q, k, v, out, lse)
            grads = run(plan, ctx.call, memory, x, dlse)
            if exchange:
                grads = _return_gradients(all_to_all, grads, q.dtype)
        dq, dk, dv = (grad.to(q.dtype) for grad in grads)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[7]:
            own = _own_heads(plan)
            dsinks = torch.zeros_like(sinks)
            dsinks[own] = sink_gradient(dout, dlse, out, lse, sinks[own]).to(sinks.dtype)
        return None, None, None, None, dq, dk, dv, dsinks


def _compute(
    plan: RankPlan,
    call: Call,
    inputs: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
    *,
    returns_lse: bool,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Returns what backward reads, and ``[out]`` or ``[out, lse]`` of this rank's tokens.

    Backward reads q, k, v, out and lse of the tokens and heads that this rank computes.
    """
    q, k, v = inputs
    dtype, exchange = q.dtype, plan.head_exchange
    run = gather_forward if plan.gather else ring_forward
    # The engine sums in float32 on its own, so autocast must not change types.
    no_autocast = torch.autocast(q.device.type, enabled=False)
    with plan.buffers.lend(q.device) as memory, no_autocast:
        if exchange:
            all_to_all = HeadAllToAll(exchange, plan.group, memory, plan.link_sums)
            heads = exchange.query_heads, exchange.kv_heads, exchange.kv_heads
            q, k, v = all_to_all.to_heads(list(map(PartitionedHeads, inputs, heads)))
        out, lse = run(plan, call, memory, q, k, v)
        if sinks is not None:
            add_sinks_(out, lse, sinks[_own_heads(plan)])
        out = out.to(dtype)
        results = [out, rearrange(lse, "b h s -> b s h 1")][: 1 + returns_lse]
        if exchange:  # one message each, because out and lse may differ in type
            parts = [PartitionedHeads(x, exchange.query_heads) for x in results]
            results = [x for part in parts for x in all_to_all.to_tokens([part])]
    lses = (rearrange(x, "b s h 1 -> b h s") for x in results[1:])
    return (q, k, v, out, lse), [results[0], *lses]


def _own_heads(plan: RankPlan) -> slice:
    """Which of the query heads of the call this rank computes."""
    exchange = plan.head_exchange
    return slice(*exchange.query_heads[exchange.index]) if exchange else slice(None)


def _exchange_gradients(
    all_to_all: HeadAllToAll,
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    *,
    returned_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Exchanges the gradients of this rank's tokens for those of the heads that it computes.

    If attention returned the lse, every rank sends both, even if a gradient reached only one of
    them here, because it cannot know which of them reached the other ranks.

    Args:
        all_to_all: sends the messages.
        dout: [B, S, H, E], zeros if no gradient reached ``out`` here.
        dlse: [B, H, S]; None if no gradient reached the lse here.
        lse: of the heads that this rank computes.
        returned_lse: whether attention returned the lse.

    Returns:
        dout [B, M, h, E] and dlse [B, h, M]; None if no gradient reached the lse on any rank.
    """
    heads = all_to_all.exchange.query_heads
    (own_dout,) = all_to_all.to_heads([PartitionedHeads(dout, heads)])
    if not returned_lse:
        return own_dout, None
    if dlse is None:
        column = lse.new_zeros((*dout.shape[:3], 1))
    else:
        column = rearrange(dlse, "b h s -> b s h 1")
    (column,) = all_to_all.to_heads([PartitionedHeads(column, heads)])
    # Without a gradient of the lse, backward saves the second kernel call of each tile.
    return own_dout, rearrange(column, "b s h 1 -> b h s") if column.any() else None


def _return_gradients(
    all_to_all: HeadAllToAll, grads: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of this rank's tokens, given those of its heads.

    Key/value heads that several ranks computed come back as a sum and are rounded after it. All
    other gradients are rounded before they are sent.
    """
    exchange = all_to_all.exchange
    dq, dk, dv = grads
    keys_dtype = accumulation_dtype(dtype) if exchange.repeats_kv_heads else dtype
    dk, dv = dk.to(keys_dtype), dv.to(keys_dtype)
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
    *,
    sinks: Tensor | None = None,
    returns_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Applies the autograd function; arguments and result are those of ``attention``.

    ``returns_lse`` is its ``return_lse``. The ``head0`` of ``dropout`` is this rank's first head
    before any all-to-all.
    """
    exchange = plan.head_exchange
    if dropout and exchange:
        first = exchange.query_heads[exchange.index][0]
        dropout = replace(dropout, head0=dropout.head0 + first)
    rows = plan.rounds[0].keys
    call = Call(kernel=kernel, scale=scale, dropout=dropout, rows=rows)
    results: Tensor | tuple[Tensor, Tensor] = _Attention.apply(
        *(plan, call, kept, returns_lse), *(q, k, v, sinks)
    )
    return results
