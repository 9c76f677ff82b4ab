"""Running a gather: attention over keys that come all at once. The plan is in plan/gather.py.

Shapes: B batch, S tokens of the shard, K keys read of other ranks, N ranks, W tokens each gives,
H query heads, G key/value heads, D head dim, E value head dim.

Heads are gathered in a few portions: while one is computed the next is under way. Backward gathers
again instead of keeping what came, and reduce-scatters the gradients of one portion while the next
is computed.

What is held is, by nature, the whole sequence for a portion of the heads, w wide (a quarter of them
where they are large): two portions gathered [N * W, B, w] (one computed, one under way) and what
was given for them, and the keys picked [K, B, w]; backward adds, in float32 (float64 for float64),
their gradients [K, B, w] and one portion on its way home [N * W, B, w].
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from cp_megatron.comm.nonblocking import Started, start_all_gather, start_reduce_scatter
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.context_parallel.keys import KeyValues, take
from cp_megatron.context_parallel.partials import Call, Gradients, Results, Rows
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels.interface import BackwardInputs
from cp_megatron.plan.gather import Gather
from cp_megatron.plan.heads import HeadGroup, cut_heads
from cp_megatron.plan.tiles import Span

MAX_PORTIONS = 4
"""Enough to hide all but a quarter; each portion more is one more collective and smaller tiles."""
LEAST_PORTION = 4 << 20
"""Bytes gathered in a portion below which starting another costs more than it hides."""


def gather_forward(
    plan: RankPlan, call: Call, memory: Workspace, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of the shard's queries over every key the mask lets them see.

    Arguments and results as ``p2p.ring_forward``.
    """
    results = Results(call, q)
    own = KeyValues(k, v)
    source = _Source(plan, memory, own)
    for portion in source.portions:
        following = source.start_next()
        groups = _from_zero(cut_heads(plan.groups, *portion))
        results.add(plan.rounds[0], own.heads(portion), groups)
        keys = source.wait(portion)
        if keys is not None:
            results.add(plan.rounds[1], keys, groups)
        source.pending = following
    return results.sums()


def gather_backward(
    plan: RankPlan, call: Call, memory: Workspace, x: BackwardInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the shard's queries, and of its keys and values from the queries of all ranks.

    Arguments and results as ``p2p.ring_backward``.
    """
    rows = Rows.of(call.kernel, x)
    shard = KeyValues(x.k, x.v)
    source = _Source(plan, memory, shard)
    own = Gradients.returned(call, rows, plan.rounds[0], shard)
    sink = _Sink(plan, memory, shard, own.grads)
    for portion in source.portions:
        following = source.start_next()
        groups = cut_heads(plan.groups, *portion)
        own.store_own(groups)
        keys = source.wait(portion)
        if source.gather.width:
            far = None
            if keys is not None:
                room = memory.room("gradients", keys.message_shape(keys.k.shape[1]), rows.dq.dtype)
                gradients = Gradients(call, rows, plan.rounds[1], keys, room)
                gradients.store_remote(_from_zero(groups))
                far = gradients.grads.packed
            sink.finish()
            sink.start(portion, far)
        source.pending = following
    sink.finish()
    return rows.dq, own.grads.k, own.grads.v


class _Source:
    """The gathers of one pass, portion by portion of the key/value heads."""

    def __init__(self, plan: RankPlan, memory: Workspace, shard: KeyValues) -> None:
        assert plan.gather is not None
        self.gather: Gather = plan.gather
        self._group, self._memory, self._shard = plan.group, memory, shard
        self._size = plan.group.size() if plan.group else 1
        gathered = self._size * plan.gather.width * math.prod(shard.message_shape(1))
        self.portions = _portions(shard.k.shape[2], gathered * shard.k.dtype.itemsize)
        self._sums = plan.link_sums
        self._started = 0
        self.pending: Started | None = self.start_next()

    def start_next(self) -> Started | None:
        """Gathers the next portion; None where there is none or nothing to gather."""
        number = self._started
        if number == len(self.portions) or not self.gather.width:
            return None
        self._started += 1
        part, dtype = self._shard.heads(self.portions[number]), self._shard.k.dtype
        # The portion before is still computed with.
        given = self._memory.room(
            f"given {number % 2}", part.message_shape(self.gather.width), dtype
        )
        num_given = sum(stop - start for start, stop in self.gather.given)
        part.pack(self.gather.given, given[:num_given])
        given[num_given:] = 0
        shape = part.message_shape(self._size * self.gather.width)
        room = self._memory.room(f"gathered {number % 2}", shape, dtype)
        return start_all_gather(given, self._group, room)

    def wait(self, portion: Span) -> KeyValues | None:
        """The keys that this rank reads of the portion under way; None where it reads none."""
        if self.pending is None:
            return None
        with traced("wait for keys"):
            gathered = self.pending.wait()  # [N * W, B, g * (D + E)]
        if self._group is not None:
            self._sums.gathered(self.pending.source, gathered, self._group)
        if not self.gather.picked:
            return None
        # [N * W, B, g * (D + E)] -> [K, B, g * (D + E)]
        picked = take(gathered, self.gather.picked, self._memory, "picked")
        return KeyValues.unpack(picked, self._shard.heads(portion))


class _Sink:
    """The reduce-scatters of gradients, one at a time, added to the shard's own."""

    def __init__(
        self, plan: RankPlan, memory: Workspace, shard: KeyValues, grads: KeyValues
    ) -> None:
        assert plan.gather is not None
        self._gather: Gather = plan.gather
        self._group, self._memory = plan.group, memory
        self._shard, self._grads = shard, grads
        self._under_way: tuple[Span, Started] | None = None

    def start(self, portion: Span, far: Tensor | None) -> None:
        """Sends gradients [K, B, g * (D + E)] home; the sum over ranks will be [W, B, ..]."""
        part, dtype = self._shard.heads(portion), self._grads.k.dtype
        size = self._group.size() if self._group else 1
        spread = self._memory.room("spread", part.message_shape(size * self._gather.width), dtype)
        spread.zero_()
        if far is not None:
            offset = 0
            for start, stop in self._gather.picked:
                spread[start:stop] = far[offset : offset + stop - start]
                offset += stop - start
        room = self._memory.room("returned", part.message_shape(self._gather.width), dtype)
        self._under_way = portion, start_reduce_scatter(spread, self._group, room)

    def finish(self) -> None:
        """Adds what is under way, once it is here."""
        if self._under_way is None:
            return
        portion, started = self._under_way
        with traced("wait for gradients"):
            returned = started.wait()
        self._grads.heads(portion).add_(self._gather.given, returned)
        self._under_way = None


def _portions(num_heads: int, num_bytes: int) -> list[Span]:
    """Key/value heads, gathered in ``num_bytes`` altogether, in a few nearly equal runs."""
    count = min(num_heads, MAX_PORTIONS, max(1, num_bytes // LEAST_PORTION))
    edges = [number * num_heads // count for number in range(count + 1)]
    return list(pairwise(edges))


def _from_zero(groups: tuple[HeadGroup, ...]) -> tuple[HeadGroup, ...]:
    """The groups with key/value heads counted from the first, as a portion holds them."""
    first = groups[0].keys[0]
    return tuple(HeadGroup(q, (k0 - first, k1 - first)) for q, (k0, k1) in groups)
