"""Which rank computes which heads, for groups that divide evenly and for those that do not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.heads import all_heads, cut_heads
from cp_megatron.plan.tiling import Span
from tests.plan.cases import heads, property_settings

Groups = list[tuple[Span, Span]]


def a2a(size: int, num_heads: int, num_kv_heads: int) -> Schedule:
    mask = Mask.causal(2 * size)
    layout = SequenceLayout.make(mask, size)
    return Schedule.build(mask, layout, "a2a", num_heads=num_heads, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(
    ("size", "num_heads", "num_kv_heads", "kv_heads", "groups"),
    [
        (2, 4, 4, [(0, 2), (2, 4)], [[((0, 2), (0, 2))]] * 2),
        (2, 8, 2, [(0, 1), (1, 2)], [[((0, 4), (0, 1))]] * 2),
        (4, 4, 2, [(0, 1), (0, 1), (1, 2), (1, 2)], [[((0, 1), (0, 1))]] * 4),
        (4, 8, 1, [(0, 1)] * 4, [[((0, 2), (0, 1))]] * 4),
        (2, 6, 3, [(0, 2), (1, 3)], [
            [((0, 2), (0, 1)), ((2, 3), (1, 2))],
            [((0, 1), (0, 1)), ((1, 3), (1, 2))],
        ]),
        (2, 12, 3, [(0, 2), (1, 3)], [
            [((0, 4), (0, 1)), ((4, 6), (1, 2))],
            [((0, 2), (0, 1)), ((2, 6), (1, 2))],
        ]),
        (4, 12, 3, [(0, 1), (0, 2), (1, 3), (2, 3)], [
            [((0, 3), (0, 1))],
            [((0, 1), (0, 1)), ((1, 3), (1, 2))],
            [((0, 2), (0, 1)), ((2, 3), (1, 2))],
            [((0, 3), (0, 1))],
        ]),
    ],
)  # fmt: skip
def test_literally(
    size: int, num_heads: int, num_kv_heads: int, kv_heads: list[Span], groups: list[Groups]
) -> None:
    schedule = a2a(size, num_heads, num_kv_heads)
    head_exchanges = [schedule.heads(rank) for rank in range(size)]
    for rank, head_exchange in enumerate(head_exchanges):
        assert head_exchange is not None
        assert list(head_exchange.kv_heads) == kv_heads
        assert [tuple(group) for group in head_exchange.groups] == groups[rank]


def test_rows_give_the_place_of_the_peers_tokens() -> None:
    """Zigzag of 8 on 4, groups of 2: ranks 0 and 1 hold 0 7 and 1 6, together 0 1 6 7."""
    mask = Mask.causal(8)
    layout = SequenceLayout.make(mask, 4, "zigzag")
    schedule = Schedule.build(
        mask, layout, "a2a+p2p", num_heads=2, num_kv_heads=1, hierarchical_sizes=(2, 2)
    )
    assert schedule.group_layout.chunks == (((0, 2), (6, 8)), ((2, 6),))
    head_exchange = schedule.heads(1)
    assert head_exchange is not None
    assert (head_exchange.peers, head_exchange.index) == ((0, 1), 1)
    assert head_exchange.rows == (((0, 1), (3, 4)), ((1, 3),))
    other = schedule.heads(3)
    assert other is not None
    assert (other.peers, other.index) == ((2, 3), 1)
    assert other.rows == (((0, 1), (3, 4)), ((1, 3),))


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), heads(n))), st.data())
@property_settings(150)
def test_a_cut_keeps_the_pairs_of_heads(
    case: tuple[int, tuple[int, int]], data: st.DataObject
) -> None:
    size, (num_heads, num_kv_heads) = case
    head_exchange = a2a(size, num_heads, num_kv_heads).heads(data.draw(st.integers(0, size - 1)))
    groups = head_exchange.groups if head_exchange else all_heads(num_heads, num_kv_heads)
    last = groups[-1].keys[1]
    cut = sorted([data.draw(st.integers(0, last)), data.draw(st.integers(0, last))])
    spans = [(0, cut[0]), (cut[0], cut[1]), (cut[1], last)]
    parts = [pair for start, stop in spans for pair in pairs(cut_heads(groups, start, stop))]
    assert parts == pairs(groups)


def pairs(groups: tuple[tuple[Span, Span], ...]) -> list[tuple[int, int]]:
    """Each query head with its key/value head."""
    return [
        (q, keys[0] + i * (keys[1] - keys[0]) // (queries[1] - queries[0]))
        for queries, keys in groups
        for i, q in enumerate(range(*queries))
    ]


@pytest.mark.parametrize(
    ("size", "num_heads", "num_kv_heads", "message"),
    [
        (4, 6, 6, "--cp-comm-type a2a: shares 6 query heads among 4 ranks, which does not divide"),
        (2, 4, 3, "--num-query-groups 3: must divide the 4 query heads"),
        (2, 4, 0, "--num-query-groups 0: must divide the 4 query heads"),
        (8, 4, 4, "(works: --cp-comm-type p2p, or a2a+p2p among 2 or 4 of them)"),
    ],
)
def test_heads_that_cannot_be_shared_are_refused(
    size: int, num_heads: int, num_kv_heads: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        a2a(size, num_heads, num_kv_heads)
