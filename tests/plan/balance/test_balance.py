"""Zigzag gives every rank the same work, and the ring moves three quarters of the keys."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from cp_megatron.plan import Mask, Schedule, SequenceLayout


def zigzag(cp_size: int, width: int = 3) -> Schedule:
    mask = Mask.causal(2 * cp_size * width)
    return Schedule.build(mask, SequenceLayout.make(mask, cp_size, "zigzag"))


def test_every_rank_holds_the_same_number_of_pairs() -> None:
    """Counted by the mask alone: the late chunk compensates for the early one."""
    for cp_size in range(1, 65):
        schedule = zigzag(cp_size)
        seq_len = schedule.mask.seq_len
        first, end = schedule.mask.key_range(np.arange(seq_len))
        pairs = {
            sum(int((end - first)[slice(*chunk)].sum()) for chunk in chunks)
            for chunks in schedule.layout.chunks
        }
        assert len(pairs) == 1
        assert pairs.pop() * cp_size == seq_len * (seq_len + 1) // 2


@pytest.mark.parametrize("cp_size", [*range(1, 13), 16, 31, 64])
def test_every_rank_computes_the_same_number_of_pairs(cp_size: int) -> None:
    schedule = zigzag(cp_size)
    some = range(cp_size) if cp_size <= 16 else (0, 1, cp_size // 2, cp_size - 1)
    seq_len = schedule.mask.seq_len
    assert {schedule.pairs(rank) * cp_size for rank in some} == {seq_len * (seq_len + 1) // 2}


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8, 17, 32])
def test_all_ranks_together_receive_three_quarters_of_a_whole_shard_ring(cp_size: int) -> None:
    schedule = zigzag(cp_size)
    whole = (cp_size - 1) * schedule.layout.shard_len
    received = [schedule.kv_tokens_received(rank) for rank in range(cp_size)]
    assert 4 * sum(received) == 3 * whole * cp_size
    assert received[0] == whole
    assert 2 * received[-1] == whole
    assert received == sorted(received, reverse=True)


def test_a_full_mask_needs_whole_shards() -> None:
    mask = Mask.full(24)
    for route in ("ring", "direct"):
        schedule = Schedule.build(mask, SequenceLayout.make(mask, 4), route=route)
        assert [schedule.kv_tokens_received(rank) for rank in range(4)] == [18] * 4


def test_documents_inside_shards_need_no_message() -> None:
    mask = Mask.documents([2, 4, 3, 3, 1, 5, 6])
    schedule = Schedule.build(mask, SequenceLayout.make(mask, 4, "contiguous"))
    assert [schedule.kv_tokens_received(rank) for rank in range(4)] == [0] * 4


def test_a_window_needs_its_width_from_the_neighbour() -> None:
    mask = Mask.causal(24, window=(2, 0))
    schedule = Schedule.build(mask, SequenceLayout.make(mask, 4, "contiguous"), route="direct")
    assert [schedule.kv_tokens_received(rank) for rank in range(4)] == [0, 2, 2, 2]


def test_bytes_received_are_keys_and_values() -> None:
    schedule = zigzag(4)
    assert [schedule.kv_tokens_received(rank) for rank in range(4)] == [18, 15, 12, 9]
    assert schedule.bytes_received(0, 64, 2) == 18 * (64 + 64) * 2
    assert schedule.bytes_received(3, 64, 4, v_head_dim=32) == 9 * (64 + 32) * 4
    assert zigzag(1).bytes_received(0, 64, 2) == 0


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (Mask.causal(1 << 21), "zigzag"),
        (Mask.full(1 << 21), "contiguous"),
        (Mask.documents([4096] * 512), "zigzag"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_one_of_1024_ranks_plans_within_a_second(mask: Mask, kind: str) -> None:
    """A second of a machine that makes ten million additions in it: machines are busy at times."""
    schedule = Schedule.build(mask, SequenceLayout.make(mask, 1024, kind))
    gc.disable()  # it would visit what other tests have left
    start = time.process_time()
    assert len(schedule.rounds(517)) == 1024
    planned = time.process_time()
    gc.enable()
    total = 0
    for number in range(10_000_000):
        total += number
    assert planned - start < time.process_time() - planned


def test_bytes_count_every_key_value_head() -> None:
    mask = Mask.causal(64)
    layout = SequenceLayout.make(mask, 4)
    one = Schedule.build(mask, layout).bytes_received(1, 8, 2)
    assert Schedule.build(mask, layout, num_kv_heads=3).bytes_received(1, 8, 2) == 3 * one
