"""Attention over keys that arrive in one all-gather. plan/gather.py plans it.

Shapes: B = batch, S = tokens of the shard, K = keys read from other ranks, N = ranks, W = tokens
that each rank gives, H = query heads, G = key/value heads, D = head dim, E = value head dim.

Heads are gathered in a few portions: while one portion is computed, the next one is gathered.
Backward gathers again instead of keeping the keys, and reduce-scatters the gradients of one portion
while the next one is computed.

The buffers hold, by the nature of the collective, the whole sequence for a portion of the heads of
width w (a quarter of the heads if they are large). Two portions are gathered, [N * W, B, w], one in
use and one in flight, with what this rank gives for them, and the keys that it reads are picked,
[K, B, w]. Backward adds, in float32 (float64 for float64), the gradients of these keys [K, B, w]
and one portion that is being reduced, [N * W, B, w].
"""

from __future__ import annotations

from torch import Tensor

from cp_megatron.comm.nonblocking import Started, start_all_gather, start_reduce_scatter
from cp_megatron.comm.trace import waiting_for
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.context_parallel.keys import KeyValues, contiguous_runs
from cp_megatron.context_parallel.partials import (
    BackwardQueries,
    Call,
    Gradients,
    MergedResults,
    gradients_at_once,
)
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels.interface import BackwardInputs, accumulation_dtype
from cp_megatron.plan.buffer_sizes import GatherBuffers, gather_buffers, gather_portions
from cp_megatron.plan.gather import Gather
from cp_megatron.plan.heads import cut_heads, from_zero
from cp_megatron.plan.tiling import Span, num_positions, pack


def gather_forward(
    plan: RankPlan, call: Call, memory: Workspace, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the attention of the shard's queries over every key that the mask allows.

    Arguments and results are those of ``p2p.ring_forward``.
    """
    results = MergedResults(plan, call, q)
    own = KeyValues(k, v)
    source = _KeySource(plan, memory, own)
    for number, portion in enumerate(source.portions):
        following = source.start_next()
        groups = from_zero(cut_heads(plan.groups, *portion))
        results.add(plan.rounds[0], own.heads(portion), groups)
        keys = source.wait(number)
        if keys is not None:
            results.add(plan.rounds[1], keys, groups)
        source.pending = following
    return results.result()


def gather_backward(
    plan: RankPlan, call: Call, memory: Workspace, x: BackwardInputs, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of the shard: of its queries, and of its keys from all queries.

    Arguments and results are those of ``p2p.ring_backward``.
    """
    if (complete := gradients_at_once(plan, call, x, dlse)) is not None:
        return complete
    queries = BackwardQueries.of(plan, call, x, dlse)
    shard = KeyValues(x.k, x.v)
    source = _KeySource(plan, memory, shard)
    own = Gradients.of_shard(plan, call, queries, shard)
    sink = _GradientSink(plan, memory, own.grads)
    for number, portion in enumerate(source.portions):
        following = source.start_next()
        groups = cut_heads(plan.groups, *portion)
        own.store_own(groups)
        keys = source.wait(number)
        if source.gather.width:
            use, remote = source.buffers(number), None
            if keys is not None:
                assert use.gradients is not None
                sums = keys.take(memory, use.gradients, accumulation_dtype(x.k.dtype))
                gradients = Gradients(call, queries, plan.rounds[1], keys, sums)
                gradients.store_remote(from_zero(groups))
                remote = gradients.grads.packed
            sink.finish()
            sink.start(portion, use, remote)
        source.pending = following
    sink.finish()
    return queries.dq, own.grads.k, own.grads.v


class _KeySource:
    """The all-gathers of one pass, one portion of the key/value heads after the other."""

    def __init__(self, plan: RankPlan, memory: Workspace, shard: KeyValues) -> None:
        assert plan.gather is not None
        self.gather: Gather = plan.gather
        self._group, self._memory, self._shard = plan.group, memory, shard
        self._num_ranks = plan.group.size() if plan.group else 1
        batch, _, num_heads, dim = shard.k.shape
        head_bytes = batch * (dim + shard.v.shape[-1]) * shard.k.dtype.itemsize
        self.portions = gather_portions(plan.gather, self._num_ranks, num_heads, head_bytes)
        self._sums = plan.link_sums
        self._started = 0
        self.pending: Started | None = self.start_next()

    def buffers(self, number: int) -> GatherBuffers:
        return gather_buffers(self.gather, self._num_ranks, number)

    def start_next(self) -> Started | None:
        """Starts to gather the next portion; None if there is no portion, or nothing to gather."""
        number = self._started
        if number == len(self.portions) or not self.gather.width:
            return None
        self._started += 1
        part, use = self._shard.heads(self.portions[number]), self.buffers(number)
        given = part.take(self._memory, use.given)
        num_given = num_positions(self.gather.given)
        part.pack(self.gather.given, given[:num_given])
        given[num_given:] = 0
        return start_all_gather(given, self._group, part.take(self._memory, use.gathered))

    def wait(self, number: int) -> KeyValues | None:
        """The keys of portion ``number`` that this rank reads; None if it reads none."""
        if self.pending is None:
            return None
        with waiting_for("keys"):
            gathered = self.pending.wait()  # [N * W, B, g * (D + E)]
        if self._group is not None:
            self._sums.gathered(self.pending.source, gathered, self._group)
        if not self.gather.picked:
            return None
        buffer = self.buffers(number).picked
        # [N * W, B, g * (D + E)] -> [K, B, g * (D + E)]
        picked = contiguous_runs(gathered, self.gather.picked, self._memory, buffer)
        return KeyValues.unpack(picked, self._shard.heads(self.portions[number]))


class _GradientSink:
    """The reduce-scatters of gradients, one at a time, added to the gradients of the shard."""

    def __init__(self, plan: RankPlan, memory: Workspace, grads: KeyValues) -> None:
        assert plan.gather is not None
        self._gather: Gather = plan.gather
        self._group, self._memory, self._grads = plan.group, memory, grads
        self._pending: tuple[Span, Started] | None = None

    def start(self, portion: Span, use: GatherBuffers, remote: Tensor | None) -> None:
        """Sends the gradients of remote keys, [K, B, g * (D + E)], to the owners of the keys."""
        part = self._grads.heads(portion)
        spread = part.take(self._memory, use.spread)
        spread.zero_()
        if remote is not None:
            for start, stop, offset in pack(self._gather.picked):
                spread[start:stop] = remote[offset : offset + stop - start]
        returned = part.take(self._memory, use.returned)  # [W, B, g * (D + E)]
        self._pending = portion, start_reduce_scatter(spread, self._group, returned)

    def finish(self) -> None:
        if self._pending is None:
            return
        portion, started = self._pending
        with waiting_for("gradients"):
            returned = started.wait()
        self._grads.heads(portion).add_(self._gather.given, returned)
        self._pending = None
