"""Rows: a pure function of (seed, i), every token a label once per epoch, parts disjoint."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.data.read.corpus import CorpusRange
from cp_megatron.data.rows.sampler import (
    ConcatenatedRows,
    count_rows,
    parse_split,
    permutation,
    split_sizes,
)
from cp_megatron.errors import ConfigError
from tests.data.ranges import EOD, range_of


def counting(size: int) -> CorpusRange:
    """Tokens that count up from 0."""
    return range_of(np.arange(size, dtype=np.uint16))


def test_a_row_is_consecutive_and_its_labels_are_shifted() -> None:
    rows = ConcatenatedRows(counting(1000), seq_length=10, seed=3)
    for number in range(rows.rows_per_epoch):
        row = rows[number]
        assert (np.diff(row.inputs.astype(int)) == 1).all()
        assert (row.labels == row.inputs + 1).all()
        assert len(row.inputs) == len(row.labels) == 10


@given(size=st.integers(2, 200), seq_length=st.integers(1, 20), seed=st.integers(0, 2**64 - 1))
def test_an_epoch_has_every_label_once(size: int, seq_length: int, seed: int) -> None:
    if size <= seq_length:
        return
    rows = ConcatenatedRows(counting(size), seq_length=seq_length, seed=seed)
    for epoch in (0, 3):
        first = epoch * rows.rows_per_epoch
        labels = np.concatenate([rows[first + i].labels for i in range(rows.rows_per_epoch)])
        assert sorted(labels) == list(range(1, rows.rows_per_epoch * seq_length + 1))
        assert size - 1 - len(labels) < seq_length


def test_rows_do_not_depend_on_what_was_read_before() -> None:
    forward = ConcatenatedRows(counting(500), seq_length=7, seed=11)
    backward = ConcatenatedRows(counting(500), seq_length=7, seed=11)
    numbers = list(range(3 * forward.rows_per_epoch))
    expected = [forward[i].inputs.tolist() for i in numbers]
    assert [backward[i].inputs.tolist() for i in reversed(numbers)] == expected[::-1]


def test_seed_and_epoch_change_the_order() -> None:
    orders = {
        tuple(permutation(50, seed=seed, epoch=epoch).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_the_order_never_changes() -> None:
    # A run that is resumed years later, with another numpy, must see the same rows.
    assert permutation(10, seed=1234, epoch=0).tolist() == [8, 9, 7, 3, 0, 1, 4, 2, 5, 6]
    assert permutation(10, seed=1234, epoch=1).tolist() == [0, 9, 5, 6, 4, 2, 8, 1, 7, 3]


def test_validation_is_read_in_order_every_epoch() -> None:
    rows = ConcatenatedRows(counting(100), seq_length=9, seed=0, shuffle=False)
    starts = [int(rows[i].inputs[0]) for i in range(2 * rows.rows_per_epoch)]
    assert starts == [9 * i for i in range(11)] * 2


def test_negative_rows_are_refused() -> None:
    with pytest.raises(IndexError):
        ConcatenatedRows(counting(100), seq_length=9, seed=0)[-1]


@pytest.mark.parametrize(
    ("inputs", "lengths"),
    [
        ([1, 2, 3, 4], (4,)),
        ([1, EOD, 3, 4], (2, 2)),
        ([1, 2, 3, EOD], (4,)),
        ([EOD, EOD, 3, 4], (1, 1, 2)),
    ],
)
def test_a_document_ends_after_its_eod(inputs: list[int], lengths: tuple[int, ...]) -> None:
    tokens = np.array([*inputs, 7], dtype=np.uint16)
    assert ConcatenatedRows(range_of(tokens), seq_length=4, seed=0)[0].document_lengths == lengths


@pytest.mark.parametrize("split", ["", "a", "1,b", "0,1,1", "-1,1", "1,2,3,4", "nan", "inf,1,1"])
def test_a_malformed_split_is_refused(split: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_split(split)
    assert caught.value.flag == "--split"
    assert caught.value.works == "969,30,1"


def test_a_short_split_has_no_other_parts() -> None:
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split("0.9,0.1") == (0.9, 0.1, 0.0)


@given(
    size=st.integers(1, 5000),
    seq_length=st.integers(1, 200),
    held_out=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_parts_are_whole_and_not_empty(
    size: int, seq_length: int, held_out: tuple[int, int]
) -> None:
    weights = (100.0, float(held_out[0]), float(held_out[1]))
    sizes = split_sizes(size, weights=weights, seq_length=seq_length)
    assert sum(sizes) == size
    assert min(sizes) >= 0
    for weight, part in zip(weights[1:], sizes[1:]):
        if weight == 0:
            assert part == 0
        elif size >= 6 * (seq_length + 1):
            assert count_rows(part, seq_length) >= 1


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), seq_length=st.integers(1, 12))
def test_documents_need_no_token_that_ends_them(lengths: list[int], seq_length: int) -> None:
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if len(owner) <= seq_length:
        return
    part = CorpusRange(
        tokens=np.arange(len(owner), dtype=np.int32),
        document_starts=(np.cumsum(lengths) - lengths).astype(np.int64),
        eod=0,
        vocab_size=len(owner),
    )
    rows = ConcatenatedRows(part, seq_length=seq_length, seed=0)
    for number in range(rows.rows_per_epoch):
        row = rows[number]
        owners = owner[row.inputs]
        pieces = np.flatnonzero(np.diff(owners, prepend=-1, append=-1))
        assert row.document_lengths == tuple(np.diff(pieces).tolist())
        assert row.crossing.tolist() == np.flatnonzero(owners != owner[row.labels]).tolist()


def test_an_id_beyond_the_vocabulary_is_refused_with_its_place() -> None:
    tokens = np.arange(100, dtype=np.int32)
    corpus = replace(range_of(tokens), document_starts=np.zeros(1, dtype=np.int64), vocab_size=77)
    rows = ConcatenatedRows(corpus.range(20, 100), seq_length=10, seed=0, shuffle=False)
    assert rows[4].inputs[-1] == 69
    with pytest.raises(ConfigError, match=r"token 77 is id 77, .* vocabulary of 77") as caught:
        rows[5]
    assert (caught.value.flag, caught.value.value) == ("--data-path", "test")
    for vocab_size, works in ((80, False), (81, True)):
        tokens_81 = replace(corpus, vocab_size=vocab_size).range(0, 81)
        with nullcontext() if works else pytest.raises(ConfigError):
            tokens_81.read(70, 81)
