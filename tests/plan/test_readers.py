"""The table of readers: the example of its docstring, and every run against the mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.exchange import ROUTES
from cp_megatron.plan.readers import Readers
from tests.plan.cases import any_schedules, property_settings
from tests.plan.simulation import held


def test_two_ranks_literally() -> None:
    """Rank 0 holds 0 1 6 7 and rank 1 holds 2 3 4 5; no other rank reads 6 and 7."""
    mask = Mask.causal(8)
    readers = Readers.of(mask, SequenceLayout.make(mask, 2, "zigzag"))
    assert readers.start.tolist() == [0, 6, 2, 4]
    assert readers.stop.tolist() == [2, 8, 4, 6]
    assert readers.owner.tolist() == [0, 0, 1, 1]
    assert readers.offset.tolist() == [0, 2, 0, 2]
    assert readers.first.tolist() == [0, 2, 4]
    assert readers.read.tolist() == [[False, True], [False, False], [True, False], [True, False]]
    assert [hops.tolist() for hops in readers.hops] == [[1, 0, 1, 1], [1, 0, 1, 1]]
    assert readers.tokens_received("ring") == readers.tokens_received("direct") == 6


def test_a_document_over_three_ranks_literally() -> None:
    """Documents 0-4 and 5-7 on 4 ranks of two tokens: rank 2 reads 0 to 3 for position 4."""
    mask = Mask.documents([5, 3])
    readers = Readers.of(mask, SequenceLayout.make(mask, 4, "contiguous"))
    runs = list(zip(readers.start.tolist(), readers.stop.tolist(), readers.read.tolist()))
    assert runs == [
        (0, 2, [False, True, True, False]),
        (2, 4, [False, False, True, False]),
        (4, 5, [False, False, False, False]),
        (5, 6, [False, False, False, True]),
        (6, 8, [False, False, False, False]),
    ]
    # Going down from rank 0, rank 2 is 2 places away and rank 1 is 3 places away.
    assert [hops.tolist() for hops in readers.hops] == [[2, 3, 0, 3, 0], [3, 3, 0, 3, 0]]
    assert readers.tokens_received("direct") == 2 * 2 + 2 + 1
    assert readers.tokens_received("ring") == 2 * 3 + 2 * 3 + 3


@given(any_schedules(max_cp=12))
@property_settings(100)
def test_every_run_has_exactly_these_readers(schedule: Schedule) -> None:
    readers, dense = schedule.readers, schedule.mask.dense()
    size = schedule.group_layout.cp_size
    held_by = [held(schedule, group * schedule.all_to_all_size) for group in range(size)]
    reads = np.stack([dense[rows].any(axis=0) for rows in held_by], axis=1)
    seen: list[int] = []
    for run, (start, stop) in enumerate(zip(readers.start, readers.stop)):
        owner, offset = int(readers.owner[run]), int(readers.offset[run])
        assert readers.first[owner] <= run < readers.first[owner + 1]
        positions = np.arange(start, stop)
        assert np.array_equal(held_by[owner][offset : offset + stop - start], positions)
        expected = reads[positions]
        expected[:, owner] = False
        assert (expected == readers.read[run]).all()
        seen += positions.tolist()
        hops = [(owner - reader) % size for reader in np.flatnonzero(readers.read[run])]
        near, far = (int(column[run]) for column in readers.hops)
        assert (near, far) == ((min(hops), max(hops)) if hops else (0, 0))
    assert sorted(seen) == list(range(schedule.mask.seq_len))


@given(any_schedules(max_cp=12))
@property_settings(50)
def test_the_table_counts_what_the_rounds_receive(schedule: Schedule) -> None:
    for route in ROUTES:
        plain = Schedule.build(schedule.mask, schedule.layout, "p2p", route)
        received = sum(plain.kv_tokens_received(rank) for rank in range(plain.layout.cp_size))
        assert plain.readers.tokens_received(route) == received


@pytest.mark.parametrize("cp_size", [1, 5])
def test_one_token_a_rank(cp_size: int) -> None:
    mask = Mask.documents([1] * cp_size)
    readers = Readers.of(mask, SequenceLayout.make(mask, cp_size, "contiguous"))
    assert not readers.read.any()
    assert readers.length.tolist() == [1] * cp_size
