"""The buffers of messages: no larger than a shard on any number of ranks, and none for nothing."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.buffer_sizes import (
    LEAST_PORTION,
    AttentionSizes,
    BufferSizes,
    gather_buffers,
    gather_portions,
    ring_buffers,
)


def tokens_per_buffer(schedule: Schedule, rank: int) -> dict[str, int]:
    """The largest message of each buffer that the rounds of ``rank`` use."""
    sizes: dict[str, int] = {}
    for buffers in ring_buffers(schedule.rounds(rank)):
        for name, num_tokens in filter(None, astuple(buffers)):
            sizes[name] = max(num_tokens, sizes.get(name, 0))
    return sizes


@pytest.mark.parametrize("route", ["ring", "direct"])
def test_buffers_do_not_grow_with_the_ranks(route: str) -> None:
    """A shard is the most that is sent at once; documents that end inside it send far less."""
    for size in (2, 4, 8):
        causal, full = Mask.causal(16 * size), Mask.full(16 * size)
        documents = Mask.documents([16] * (size - 1) + [10, 6])
        for mask, expected in ((causal, 16), (full, 16), (documents, 0)):
            kind = "zigzag" if mask is causal else "contiguous"
            schedule = Schedule.build(mask, SequenceLayout.make(mask, size, kind), route=route)
            found = [tokens_per_buffer(schedule, rank) for rank in range(size)]
            assert max((n for sizes in found for n in sizes.values()), default=0) == expected
            assert max(map(len, found)) <= 9


def test_buffers_of_two_ranks_literally() -> None:
    """Rank 0 holds 0 1 6 7 and sends 0 1; rank 1 holds 2 3 4 5 and sends all of them."""
    mask = Mask.causal(8)
    layout = SequenceLayout.make(mask, 2, "zigzag")
    schedule = Schedule.build(mask, layout)
    # Keys to send lie in keys 1, keys that arrive in keys 0; one run of gradients leaves in place.
    assert tokens_per_buffer(schedule, 0) == {
        "keys 0": 4, "keys 1": 2, "gradients 1": 4, "returned": 2
    }  # fmt: skip
    assert tokens_per_buffer(schedule, 1) == {
        "keys 0": 2, "keys 1": 4, "gradients 1": 2, "returned": 4
    }  # fmt: skip
    window = Mask.causal(8, window=(1, 0))
    narrow = Schedule.build(window, SequenceLayout.make(window, 2, "contiguous"))
    assert tokens_per_buffer(narrow, 0) == {"keys 1": 1, "returned": 1}
    assert tokens_per_buffer(narrow, 1) == {"keys 0": 1, "gradients 1": 1}
    assert tokens_per_buffer(Schedule.build(mask, layout, "a2a", num_heads=2), 0) == {}


def test_a_gather_holds_two_portions_of_all_keys() -> None:
    mask = Mask.causal(8)
    schedule = Schedule.build(mask, SequenceLayout.make(mask, 2, "zigzag"), "all_gather")
    gather = schedule.gather(0)
    assert gather is not None
    first, second, third = (gather_buffers(gather, 2, number) for number in range(3))
    assert first.gathered.num_tokens == first.spread.num_tokens == 8
    assert first.given.num_tokens == first.returned.num_tokens == 4
    assert first.gathered.name == third.gathered.name != second.gathered.name
    assert first.picked is None, "rank 0 reads one run"
    assert first.gradients is not None
    assert first.gradients.num_tokens == 4
    assert gather_portions(gather, 2, 6, 1) == [(0, 6)], "too little to split"
    assert gather_portions(gather, 2, 6, LEAST_PORTION) == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert gather_portions(gather, 2, 2, LEAST_PORTION) == [(0, 1), (1, 2)]


def test_a_buffer_grows_to_its_largest_message() -> None:
    mask = Mask.causal(8)
    schedule = Schedule.build(mask, SequenceLayout.make(mask, 2, "contiguous"))
    x = AttentionSizes(batch=3, num_tokens=4, kv_heads=1, head_dim=5, element=2, exact=4)
    sizes = BufferSizes()
    for _ in range(2):
        sizes.add(schedule, 0, x, backward=False)
        assert sizes.num_bytes == 4 * 3 * 2 * 5 * 2, "rank 0 sends its four tokens"
    sizes.add(schedule, 0, x, backward=True)
    assert sizes.num_bytes == 4 * 3 * 2 * 5 * (2 + 4), "and their gradients return"
