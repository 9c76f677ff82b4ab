"""Packing: every token once, whole documents, no label across documents, little padding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.data.read.corpus import CorpusRange
from cp_megatron.data.rows.best_fit import PackedRows, pack
from cp_megatron.data.rows.sampler import IGNORED

EOD = 5000
documents = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def starts_of(lengths: list[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    sizes = np.asarray(lengths, dtype=np.int64)
    return np.cumsum(sizes) - sizes


def rows_of(lengths: list[int], seq_length: int, *, shuffle: bool = True) -> PackedRows:
    """Packed documents whose tokens count up from 0."""
    part = CorpusRange(
        tokens=np.arange(sum(lengths), dtype=np.int32),
        document_starts=starts_of(lengths),
        eod=EOD,
        vocab_size=EOD + 1,
    )
    return PackedRows(part, seq_length=seq_length, seed=3, shuffle=shuffle)


def best_fit_by_hand(lengths: list[int], size: int) -> list[int]:
    """The tokens in each row when one piece after the other goes where it fits best."""
    pieces = [size] * sum(length // size for length in lengths)
    pieces += [length % size for length in lengths if length % size]
    rows: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [row for row, used in enumerate(rows) if used + piece <= size]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += piece
        else:
            rows.append(piece)
    return sorted(rows)


@given(lengths=documents, seq_length=st.integers(1, 24))
def test_it_is_best_fit_decreasing(lengths: list[int], seq_length: int) -> None:
    packing = pack(starts_of(lengths), sum(lengths), seq_length=seq_length, seed=0)
    used = np.add.reduceat(packing.lengths, packing.bounds[:-1])
    assert sorted(used.tolist()) == best_fit_by_hand(lengths, seq_length)


@given(lengths=documents, seq_length=st.integers(1, 24))
def test_every_token_once_and_no_label_crosses(lengths: list[int], seq_length: int) -> None:
    rows = rows_of(lengths, seq_length)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    whole = {n for n, length in enumerate(lengths) if length <= seq_length}
    seen: list[int] = []
    labels: list[int] = []
    found: list[int] = []
    for number in range(rows.rows_per_epoch):
        row = rows[number]
        assert len(row.inputs) == len(row.labels) == sum(row.document_lengths) == seq_length
        begin = 0
        for length in row.document_lengths:
            tokens = row.inputs[begin : begin + length]
            targets = row.labels[begin : begin + length]
            begin += length
            if tokens[0] == EOD:
                assert (targets == IGNORED).all()
                assert (tokens == EOD).all()
                continue
            (document,) = set(owner[tokens].tolist())
            found.append(document)
            seen += tokens.tolist()
            valid = targets != IGNORED
            assert (targets[valid] == tokens[valid] + 1).all()
            assert (owner[targets[valid]] == document).all()
            labels += targets[valid].tolist()
    assert sorted(seen) == list(range(sum(lengths)))
    firsts = set(starts_of(lengths).tolist())
    assert sorted(labels) == [token for token in range(sum(lengths)) if token not in firsts]
    assert all(found.count(document) == 1 for document in whole)


def test_the_drawn_example() -> None:
    packing = pack(starts_of([23, 7, 4, 3, 2]), 39, seq_length=10, seed=0)
    assert packing.starts.tolist() == [0, 10, 20, 23, 30, 34, 37]
    assert packing.lengths.tolist() == [10, 10, 3, 7, 4, 3, 2]
    assert packing.bounds.tolist() == [0, 1, 2, 4, 7]


def test_under_one_percent_is_wasted_on_log_normal_documents() -> None:
    for size, seq_length in ((20_000, 2048), (20_000, 8192), (50_000, 65_536)):
        draws = np.random.default_rng(0).lognormal(6.5, 1.2, size)
        lengths = np.maximum(1, draws).astype(np.int64)
        packing = pack(starts_of(lengths), int(lengths.sum()), seq_length=seq_length, seed=1)
        assert packing.waste < 0.01, (size, seq_length, packing.waste)


def test_rows_are_a_pure_function_of_their_number() -> None:
    lengths = np.random.default_rng(1).integers(1, 40, 100).tolist()
    one, other = rows_of(lengths, 32), rows_of(lengths, 32)
    numbers = list(range(3 * one.rows_per_epoch))
    forward = [one[number].inputs.tolist() for number in numbers]
    assert [other[number].inputs.tolist() for number in reversed(numbers)] == forward[::-1]
    epoch = one.rows_per_epoch
    assert forward[:epoch] != forward[epoch : 2 * epoch]
    assert sorted(forward[:epoch]) == sorted(forward[epoch : 2 * epoch])
    in_order = rows_of(lengths, 32, shuffle=False)
    assert in_order[0].inputs.tolist() == in_order[epoch].inputs.tolist()


def test_only_tokens_with_a_loss_are_labels() -> None:
    part = CorpusRange(
        tokens=np.arange(8, dtype=np.int32),
        document_starts=np.array([0, 5]),
        eod=EOD,
        vocab_size=EOD + 1,
        loss=np.array([1, 0, 0, 1, 1, 1, 0, 1], dtype=bool),
    )
    rows = PackedRows(part, seq_length=8, seed=0)
    assert rows.rows_per_epoch == 1
    no = IGNORED
    assert rows[0].labels.tolist() == [no, no, 3, 4, no, no, 7, no]
