"""Layouts: Megatron-LM's slicing, literal examples, and the properties of every layout."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.layout import KINDS, sequence_divisor
from tests.plan.cases import property_settings


def held(seq_len: int, cp_size: int, kind: str) -> list[list[int]]:
    layout = SequenceLayout.make(Mask.causal(seq_len), cp_size, kind)
    return [layout.positions(rank).tolist() for rank in range(cp_size)]


def test_zigzag_is_the_slicing_of_megatron() -> None:
    tokens = np.arange(1, 9)
    (zero, one) = held(8, 2, "zigzag")
    assert (zero, tokens[zero].tolist()) == ([0, 1, 6, 7], [1, 2, 7, 8])
    assert (one, tokens[one].tolist()) == ([2, 3, 4, 5], [3, 4, 5, 6])


def test_zigzag_of_four_ranks() -> None:
    assert held(8, 4, "zigzag") == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert held(16, 4, "zigzag") == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]


def test_zigzag_holds_chunks_r_and_2n_minus_1_minus_r() -> None:
    for cp_size in (2, 3, 8, 64):
        layout = SequenceLayout.make(Mask.causal(10 * cp_size), cp_size, "zigzag")
        for rank, chunks in enumerate(layout.chunks):
            late = 2 * cp_size - 1 - rank
            assert chunks == ((5 * rank, 5 * rank + 5), (5 * late, 5 * late + 5))


def test_contiguous() -> None:
    assert held(6, 3, "contiguous") == [[0, 1], [2, 3], [4, 5]]


def test_one_rank_is_the_identity_for_any_length() -> None:
    for kind in KINDS:
        assert held(7, 1, kind) == [list(range(7))]


@given(st.sampled_from(KINDS), st.integers(1, 64), st.integers(1, 5))
@property_settings(60)
def test_every_position_is_held_once_and_shards_are_equal(kind: str, cp: int, width: int) -> None:
    seq_len = sequence_divisor(kind, cp) * width
    layout = SequenceLayout.make(Mask.causal(seq_len), cp, kind)
    shards = [layout.positions(rank) for rank in range(cp)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(seq_len))
    assert {len(shard) for shard in shards} == {layout.shard_len} == {seq_len // cp}
    assert all(shard.dtype == np.int64 and (np.diff(shard) > 0).all() for shard in shards)
    assert layout.cp_size == cp


def test_auto_is_balanced_for_documents_and_zigzag_for_one_causal_sequence() -> None:
    assert SequenceLayout.make(Mask.causal(8), 2).kind == "zigzag"
    assert SequenceLayout.make(Mask.full(8), 2).kind == "contiguous"
    assert SequenceLayout.make(Mask.documents([8]), 2).kind == "zigzag"
    assert SequenceLayout.make(Mask.documents([3, 5]), 2).kind == "balanced"
    assert SequenceLayout.make(Mask.documents([3, 5], causal=False), 2).kind == "balanced"


@pytest.mark.parametrize(
    ("seq_len", "cp_size", "kind", "message"),
    [
        (10, 2, "zigzag", "--seq-length 10: the zigzag layout on 2 context parallel ranks needs a "
         "multiple of 4 (works: 8, 12)"),
        (10, 4, "contiguous", "multiple of 4 (works: 8, 12)"),
        (3, 2, "zigzag", "multiple of 4 (works: 4)"),
        (12, 8, "zigzag", "multiple of 16 (works: 16)"),
        (8, 0, "zigzag", "--context-parallel-size 0: must be at least 1"),
        (10, 4, "balanced", "the balanced layout on 4 context parallel ranks needs a multiple"),
        (8, 2, "spiral", "is not a layout (works: auto, contiguous, zigzag, balanced)"),
    ],
)  # fmt: skip
def test_refusals_name_what_works(seq_len: int, cp_size: int, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SequenceLayout.make(Mask.causal(seq_len), cp_size, kind)


def test_documents_need_no_divisibility() -> None:
    layout = SequenceLayout.make(Mask.documents([1, 2, 5]), 4, "zigzag")
    assert layout.positions(1).tolist() == [1, 6]
