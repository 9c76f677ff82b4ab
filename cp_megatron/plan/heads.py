"""a2a: ranks exchange heads for tokens by all-to-all.

Each rank starts with its tokens and all heads, and ends with every token of its group and some of
the heads. For 4 query heads, 2 key/value heads and 4 ranks, it starts with a quarter of the tokens
and ends with one query head. A key/value head goes to every rank that has one of its query heads:

    rank            0    1    2    3
    query head      0    1    2    3
    kv head         0    0    1    1

If a rank has fewer query heads than share a key/value head, that head is sent to several ranks. A
rank's groups may be of unequal size (6 query heads, 3 kv heads, 2 ranks: rank 0 has two query heads
of kv head 0 and one of kv head 1). Such groups are computed one after the other, and no head is
repeated.

``a2a+p2p`` with sizes (A, P): A neighbours exchange heads, and P groups of neighbours run a ring
over the tokens that each group holds together.

Sources: DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509); two levels: USP (Fang and Zhao
2024, arXiv:2405.07719).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from cp_megatron.errors import ConfigError
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.tiling import Span, merge_spans, num_positions, relative_spans


class HeadGroup(NamedTuple):
    """Query heads and their key/value heads, each of which serves equally many query heads."""

    queries: Span
    keys: Span


def all_heads(num_heads: int, num_kv_heads: int) -> tuple[HeadGroup, ...]:
    """All heads as one group."""
    return (HeadGroup((0, num_heads), (0, num_kv_heads)),)


def cut_heads(groups: tuple[HeadGroup, ...], start: int, stop: int) -> tuple[HeadGroup, ...]:
    """Selects the part of ``groups`` with key/value heads ``start:stop``."""
    found = []
    for (q0, q1), (k0, k1) in groups:
        a, b = max(k0, start), min(k1, stop)
        if a < b:
            serves = (q1 - q0) // (k1 - k0)
            found.append(HeadGroup((q0 + (a - k0) * serves, q0 + (b - k0) * serves), (a, b)))
    return tuple(found)


def from_zero(groups: tuple[HeadGroup, ...]) -> tuple[HeadGroup, ...]:
    """Counts key/value heads from the first of ``groups``, as a message of these heads has them."""
    first = groups[0].keys[0]
    return tuple(HeadGroup(q, (k0 - first, k1 - first)) for q, (k0, k1) in groups)


def even_runs(num_heads: int, count: int) -> tuple[Span, ...]:
    """Splits heads into ``count`` nearly equal runs; ``count`` is at most their number."""
    return tuple(pairwise(number * num_heads // count for number in range(count + 1)))


def halves(groups: tuple[HeadGroup, ...]) -> tuple[tuple[HeadGroup, ...], tuple[HeadGroup, ...]]:
    """Splits ``groups`` between key/value heads, or one such head between its query heads.

    Of one key/value head with one query head, the first half is empty.
    """
    num_heads = groups[-1].keys[1]
    if num_heads > 1:
        middle = num_heads // 2
        return cut_heads(groups, 0, middle), cut_heads(groups, middle, num_heads)
    ((q0, q1), keys) = groups[0]
    middle = (q0 + q1) // 2
    first, second = HeadGroup((q0, middle), keys), HeadGroup((middle, q1), keys)
    return ((first,) if middle > q0 else ()), (second,)


@dataclass(frozen=True, kw_only=True)
class HeadExchange:
    """One rank's part of the all-to-all.

    Attributes:
        peers: the ranks that exchange heads, in order, including this one.
        index: the place of this rank in ``peers``.
        query_heads, kv_heads: for each peer, the heads that it computes.
        rows: for each peer, where the tokens of its shard lie among the tokens of all peers.
        groups: this rank's heads, counted from its first one, as kernels take them.
    """

    peers: tuple[int, ...]
    index: int
    query_heads: tuple[Span, ...]
    kv_heads: tuple[Span, ...]
    rows: tuple[tuple[Span, ...], ...]
    groups: tuple[HeadGroup, ...]

    @property
    def repeats_kv_heads(self) -> bool:
        """Whether several peers compute the same key/value head."""
        return num_positions(self.kv_heads) > self.kv_heads[-1][1]


def check_heads(size: int, num_heads: int | None, num_kv_heads: int | None, exchange: str) -> None:
    """Checks that ``size`` ranks can share the heads.

    Raises:
        ConfigError: the number of heads is unknown, too small or not divisible.
    """
    if num_heads is None:
        raise ConfigError("--cp-comm-type", exchange, "needs to know the number of heads")
    if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        rule = f"must divide the {num_heads} query heads"
        raise ConfigError("--num-query-groups", num_kv_heads, rule)
    if num_heads % size:
        sizes = [str(n) for n in range(2, size) if num_heads % n == 0]
        rule = f"shares {num_heads} query heads among {size} ranks, which does not divide"
        works = "--cp-comm-type p2p"
        if sizes:
            works += f", or a2a+p2p among {' or '.join(sizes)} of them"
        raise ConfigError("--cp-comm-type", exchange, rule, works)


def merged_layout(layout: SequenceLayout, size: int) -> SequenceLayout:
    """Returns the layout of groups of ``size`` neighbours: the tokens each group holds together."""
    groups = range(0, layout.cp_size, size)
    held = tuple(_together(layout, range(first, first + size)) for first in groups)
    return SequenceLayout(held, layout.kind)


def plan_heads(
    layout: SequenceLayout, rank: int, size: int, num_heads: int, num_kv_heads: int
) -> HeadExchange:
    """Plans the part of ``rank`` in the all-to-all with its ``size`` neighbours."""
    first = rank // size * size
    peers = tuple(range(first, first + size))
    share, serves = num_heads // size, num_heads // num_kv_heads
    query_heads = tuple((i * share, (i + 1) * share) for i in range(size))
    kv_heads = tuple((a // serves, -(-b // serves)) for a, b in query_heads)
    together = _together(layout, peers)
    return HeadExchange(
        peers=peers,
        index=rank - first,
        query_heads=query_heads,
        kv_heads=kv_heads,
        rows=tuple(tuple(relative_spans(layout.chunks[peer], together)) for peer in peers),
        groups=_groups(*query_heads[rank - first], serves),
    )


def _groups(start: int, stop: int, serves: int) -> tuple[HeadGroup, ...]:
    """Cuts query heads ``start:stop`` where their number per key/value head changes."""
    groups: list[HeadGroup] = []
    first = start // serves
    for kv in range(first, -(-stop // serves)):
        a, b = max(start, kv * serves) - start, min(stop, (kv + 1) * serves) - start
        last = groups[-1] if groups else None
        if last:
            (q0, q1), (k0, k1) = last
            if (b - a) * (k1 - k0) == q1 - q0:
                groups[-1] = HeadGroup((q0, b), (k0, kv - first + 1))
                continue
        groups.append(HeadGroup((a, b), (kv - first, kv - first + 1)))
    return tuple(groups)


def _together(layout: SequenceLayout, peers: Iterable[int]) -> tuple[Span, ...]:
    """The chunks that ``peers`` hold together, by position."""
    return tuple(merge_spans(sorted(chunk for peer in peers for chunk in layout.chunks[peer])))
