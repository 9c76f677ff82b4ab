"""a2a: ranks trade tokens for heads; each ends with every token of the group and some of the heads.

4 query heads, 2 key/value heads, 4 ranks: each rank starts with a quarter of the tokens and all
heads, and ends with all tokens and one query head. A key/value head goes to every rank that has one
of its query heads, and to no other:

    rank            0    1    2    3
    query head      0    1    2    3
    kv head         0    0    1    1

With fewer query heads per rank than a key/value head serves, heads are repeated on the wire just as
often as that; local groups of unequal size (6 query heads, 3 kv heads, 2 ranks: rank 0 has two of
kv head 0 and one of kv head 1) are computed one after the other and repeat nothing.

``a2a+p2p`` with sizes (A, P): A neighbours head_exchange, and the P groups of neighbours run a ring over
the tokens that the group holds together.

Sources: DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509); two levels: USP (Fang and Zhao
2024, arXiv:2405.07719).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cp_megatron.errors import ConfigError
from cp_megatron.plan.layout import Chunk, SequenceLayout
from cp_megatron.plan.tiling import Span, merge_spans, num_positions, relative_spans


class HeadGroup(NamedTuple):
    """Query heads and the key/value heads they read, all of which serve equally many."""

    queries: Span
    keys: Span


def all_heads(num_heads: int, num_kv_heads: int) -> tuple[HeadGroup, ...]:
    """Every head as one group."""
    return (HeadGroup((0, num_heads), (0, num_kv_heads)),)


def cut_heads(groups: tuple[HeadGroup, ...], start: int, stop: int) -> tuple[HeadGroup, ...]:
    """The part of ``groups`` with key/value heads ``start:stop``."""
    found = []
    for (q0, q1), (k0, k1) in groups:
        a, b = max(k0, start), min(k1, stop)
        if a < b:
            serves = (q1 - q0) // (k1 - k0)
            found.append(HeadGroup((q0 + (a - k0) * serves, q0 + (b - k0) * serves), (a, b)))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class HeadExchange:
    """One rank's view of the head_exchange.

    Attributes:
        peers: the ranks that head_exchange, in order, this one among them.
        index: where in ``peers`` this rank is.
        query_heads, kv_heads: per peer, the heads it computes.
        rows: per peer, where its shard's tokens lie in the group's, in the shard's order.
        groups: this rank's heads, counted from its first, as kernels take them.
    """

    peers: tuple[int, ...]
    index: int
    query_heads: tuple[Span, ...]
    kv_heads: tuple[Span, ...]
    rows: tuple[tuple[Span, ...], ...]
    groups: tuple[HeadGroup, ...]

    @property
    def repeats_kv_heads(self) -> bool:
        """Whether a key/value head is computed by several peers."""
        return num_positions(self.kv_heads) > self.kv_heads[-1][1]


def check_heads(size: int, num_heads: int | None, num_kv_heads: int | None, exchange: str) -> None:
    """Refuses heads that ``size`` ranks can not share.

    Raises:
        ConfigError: the heads are not given, too few, or not divisible.
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
    """The layout of groups of ``size`` neighbours: what they hold together, by position."""
    groups = range(0, layout.cp_size, size)
    held = tuple(_together(layout, range(first, first + size)) for first in groups)
    return SequenceLayout(held, layout.kind)


def plan_heads(
    layout: SequenceLayout, rank: int, size: int, num_heads: int, num_kv_heads: int
) -> HeadExchange:
    """The trade of ``rank`` with its ``size`` neighbours."""
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
    """Query heads ``start:stop`` cut where the number per key/value head changes."""
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


def _together(layout: SequenceLayout, peers: Iterable[int]) -> tuple[Chunk, ...]:
    """What ``peers`` hold, by position."""
    return tuple(merge_spans(sorted(chunk for peer in peers for chunk in layout.chunks[peer])))
