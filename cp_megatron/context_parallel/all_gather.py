"""Running a gather: attention over keys that come all at once. The plan is in plan/gather.py.

Shapes: B batch, S tokens of the shard, K keys read of other ranks, N ranks, W tokens each gives,
H query heads, G key/value heads, D head dim, E value head dim.

Heads are gathered in a few portions: while one is computed the next is under way. Backward gathers
again instead of keeping what came, and reduce-scatters the gradients of one portion while the next
is computed.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from cp_megatron.comm.nonblocking import Started, start_all_gather, start_reduce_scatter
from cp_megatron.comm.trace import traced
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
    plan: RankPlan, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of the shard's queries over every key the mask lets them see.

    Arguments and results as ``p2p.ring_forward``.
    """
    results = Results(call, q)
    own = KeyValues(k, v)
    source = _Source(plan, own)
    for portion in source.portions:
        following = source.start_next()
        groups = _from_zero(cut_heads(plan.groups, *portion))
        results.add(plan.rounds[0], own.heads(portion), groups)
        keys = source.wait(portion)
        if keys is not None:
            results.add(plan.rounds[1], keys, groups)
        source.pending = following
    return results.sums()


def gather_backward(plan: RankPlan, call: Call, x: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the shard's queries, and of its keys and values from the queries of all ranks.

    Arguments and results as ``p2p.ring_backward``.
    """
    rows = Rows.of(call.kernel, x)
    shard = KeyValues(x.k, x.v)
    source = _Source(plan, shard)
    own = Gradients(call, rows, plan.rounds[0], shard)
    sinks: list[tuple[Span, Started]] = []
    for portion in source.portions:
        following = source.start_next()
        groups = cut_heads(plan.groups, *portion)
        own.store_own(groups)
        keys = source.wait(portion)
        if source.gather.width:
            far = None
            if keys is not None:
                gradients = Gradients(call, rows, plan.rounds[1], keys)
                gradients.store_remote(_from_zero(groups))
                far = gradients.grads
            sinks.append((portion, source.start_return(portion, far, rows.dq)))
        source.pending = following
    for portion, sink in sinks:
        with traced("wait for gradients"):
            returned = sink.wait()
        own.grads.heads(portion).add_(source.gather.given, returned)
    return rows.dq, own.grads.k, own.grads.v


class _Source:
    """The collectives of one pass, portion by portion of the key/value heads."""

    def __init__(self, plan: RankPlan, shard: KeyValues) -> None:
        assert plan.gather is not None
        self.gather: Gather = plan.gather
        self._group, self._shard = plan.group, shard
        self._size = plan.group.size() if plan.group else 1
        token = shard.empty(1, shard.k.dtype)
        gathered = self._size * plan.gather.width * token.numel() * token.element_size()
        self.portions = _portions(shard.k.shape[2], gathered)
        self._waiting = list(self.portions)
        self.pending: Started | None = self.start_next()

    def start_next(self) -> Started | None:
        """Gathers the next portion; None where there is none or nothing to gather."""
        if not self._waiting or not self.gather.width:
            return None
        part = self._shard.heads(self._waiting.pop(0)).pack()
        assert part.packed is not None
        given = take(part.packed, self.gather.given) if self.gather.given else part.packed[:0]
        if len(given) < self.gather.width:
            padded = given.new_zeros((self.gather.width, *given.shape[1:]))
            padded[: len(given)] = given
            given = padded
        return start_all_gather(given, self._group)

    def wait(self, portion: Span) -> KeyValues | None:
        """The keys that this rank reads of the portion under way; None where it reads none."""
        if self.pending is None:
            return None
        with traced("wait for keys"):
            gathered = self.pending.wait()  # [N * W, B, g * (D + E)]
        if not self.gather.picked:
            return None
        # [N * W, B, g * (D + E)] -> [K, B, g * (D + E)]
        return KeyValues.unpack(take(gathered, self.gather.picked), self._shard.heads(portion))

    def start_return(self, portion: Span, far: KeyValues | None, like: Tensor) -> Started:
        """Sends gradients [K, B, g * (D + E)] home; the sum over ranks will be [W, B, ..]."""
        part = self._shard.heads(portion)
        spread = part.empty(self._size * self.gather.width, like.dtype).zero_()
        if far is not None:
            assert far.packed is not None
            offset = 0
            for start, stop in self.gather.picked:
                spread[start:stop] = far.packed[offset : offset + stop - start]
                offset += stop - start
        return start_reduce_scatter(spread, self._group)


def _portions(num_heads: int, num_bytes: int) -> list[Span]:
    """Key/value heads, gathered in ``num_bytes`` altogether, in a few nearly equal runs."""
    count = min(num_heads, MAX_PORTIONS, max(1, num_bytes // LEAST_PORTION))
    edges = [number * num_heads // count for number in range(count + 1)]
    return list(pairwise(edges))


def _from_zero(groups: tuple[HeadGroup, ...]) -> tuple[HeadGroup, ...]:
    """The groups with key/value heads counted from the first, as a portion holds them."""
    first = groups[0].keys[0]
    return tuple(HeadGroup(q, (k0 - first, k1 - first)) for q, (k0, k1) in groups)
