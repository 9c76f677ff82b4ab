"""Blends: every prefix holds the share of each dataset, to within one row."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.data.rows.blend import PERIOD, BlendedRows, make_pattern
from cp_megatron.data.rows.sampler import TokenRow

weights_of = st.lists(st.integers(1, 60), min_size=1, max_size=12)


class Numbered:
    """A dataset whose row k holds the name of the dataset and k."""

    seq_length = 2
    eod = 0

    def __init__(self, name: int, rows_per_epoch: int = 10) -> None:
        self.name, self.rows_per_epoch = name, rows_per_epoch

    def __getitem__(self, number: int) -> TokenRow:
        tokens = np.array([self.name, number], dtype=np.int64)
        none = np.empty(0, dtype=np.int64)
        return TokenRow(inputs=tokens, labels=tokens, document_lengths=(2,), crossing=none)


@given(whole=weights_of, scale=st.integers(1, 9))
def test_a_prefix_has_each_dataset_within_one_row_of_its_share(
    whole: list[int], scale: int
) -> None:
    weights = [Fraction(weight, scale) for weight in whole]
    rows = BlendedRows([Numbered(name) for name in range(len(whole))], weights)
    counts = [0] * len(whole)
    for number in range(2 * sum(whole) + 3):
        name, row = rows[number].inputs.tolist()
        assert row == counts[name], "the rows of a dataset come in order, each once"
        counts[name] += 1
        for one, weight in zip(counts, whole):
            assert abs(one - Fraction((number + 1) * weight, sum(whole))) < 1


def test_the_drawn_example() -> None:
    pattern = make_pattern([Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)])
    assert "".join("ABC"[d] for d in pattern.dataset) == "ABABAC"


def test_any_row_is_found_without_the_ones_before() -> None:
    rows = BlendedRows([Numbered(0), Numbered(1)], [Fraction(7, 10), Fraction(3, 10)])
    assert rows[10**12].inputs.tolist() == [0, 7 * 10**11]
    with pytest.raises(IndexError):
        rows[-1]


def test_without_weights_an_epoch_has_every_row_once() -> None:
    rows = BlendedRows([Numbered(0, 7), Numbered(1, 12), Numbered(2, 1)])
    assert rows.rows_per_epoch == 20
    found = sorted(tuple(rows[number].inputs.tolist()) for number in range(20))
    assert found == [(d, k) for d, count in enumerate((7, 12, 1)) for k in range(count)]


def test_fine_weights_are_rounded_and_no_dataset_is_lost() -> None:
    pattern = make_pattern([Fraction(10**9), Fraction(1), Fraction(333_333_333)])
    assert abs(len(pattern.dataset) - PERIOD) <= 3
    assert pattern.counts[1] == 1
    assert abs(pattern.counts[2] - PERIOD / 4) < 2
