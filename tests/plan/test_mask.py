"""Masks: small ones literally, random ones against an independent definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask
from tests.plan.cases import masks, property_settings


def picture(mask: Mask) -> list[str]:
    return ["".join("x" if pair else "." for pair in row) for row in mask.dense()]


LITERAL = [
    (Mask.causal(4), ["x...", "xx..", "xxx.", "xxxx"]),
    (Mask.full(3), ["xxx", "xxx", "xxx"]),
    (Mask.documents([3, 2]), ["x....", "xx...", "xxx..", "...x.", "...xx"]),
    (Mask.documents([1, 2], causal=False), ["x..", ".xx", ".xx"]),
    (Mask.causal(4, window=(1, 0)), ["x...", "xx..", ".xx.", "..xx"]),
    (Mask.full(4, window=(1, 2)), ["xxx.", "xxxx", ".xxx", "..xx"]),
    (Mask.full(3, window=(-1, 0)), ["x..", "xx.", "xxx"]),
    (Mask.full(3, window=(0, -1)), ["xxx", ".xx", "..x"]),
    (Mask.documents([2, 3], window=(1, 0)), ["x....", "xx...", "..x..", "..xx.", "...xx"]),
    (Mask.causal(3, window=(-1, 7)), ["x..", "xx.", "xxx"]),
]


@pytest.mark.parametrize(("mask", "rows"), LITERAL)
def test_dense_literally(mask: Mask, rows: list[str]) -> None:
    assert picture(mask) == rows
    assert mask.pairs() == sum(row.count("x") for row in rows)


@given(mask=masks(12), other=masks(12))
@property_settings(60)
def test_under_another_window(mask: Mask, other: Mask) -> None:
    found = mask.within(other.window)
    expected = Mask.documents(mask.lengths, causal=mask.is_causal, window=other.window)
    assert (found.lengths, found.is_causal, found.window) == (
        expected.lengths,
        expected.is_causal,
        expected.window,
    )
    assert found.within(mask.window) == mask
    with pytest.raises(ConfigError, match="-1 for unlimited"):
        mask.within((-2, 0))


def attends(mask: Mask, q: int, k: int) -> bool:
    """The definition, one pair at a time."""
    document = [i for i, length in enumerate(mask.lengths) for _ in range(length)]
    left, right = mask.window
    return (
        document[q] == document[k]
        and (not mask.is_causal or k <= q)
        and (left == -1 or q - left <= k)
        and (right == -1 or k <= q + right)
    )


@given(st.integers(1, 14).flatmap(masks))
@property_settings(150)
def test_dense_is_the_definition(mask: Mask) -> None:
    size = range(mask.seq_len)
    assert mask.dense().tolist() == [[attends(mask, q, k) for k in size] for q in size]


@given(st.integers(1, 40).flatmap(masks))
@property_settings(150)
def test_counts_and_ranges_are_the_dense_mask(mask: Mask) -> None:
    dense = mask.dense()
    assert mask.pairs() == dense.sum()
    first, end = mask.key_range(np.arange(mask.seq_len))
    for q, row in enumerate(dense):
        assert np.flatnonzero(row).tolist() == list(range(first[q], end[q]))
    cut = not np.array_equal(dense, Mask.documents(mask.lengths, mask.is_causal).dense())
    assert mask.has_window or not cut


def test_positions_restart_at_every_document() -> None:
    assert Mask.documents([3, 1, 2]).document_positions().tolist() == [0, 1, 2, 0, 0, 1]
    assert Mask.causal(4).document_positions().tolist() == [0, 1, 2, 3]
    assert Mask.documents([3, 1, 2]).starts.tolist() == [0, 3, 4, 6]
    assert Mask.documents([3, 1]).document_positions().dtype == np.int64


def test_counts_are_exact_beyond_32_bits() -> None:
    size = 1 << 20
    assert Mask.causal(size).pairs() == size * (size + 1) // 2
    assert Mask.full(size).pairs() == size * size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask.causal(0), "mask lengths"),
        (lambda: Mask.causal(-3), "mask lengths"),
        (lambda: Mask.documents([]), "one or more"),
        (lambda: Mask.documents([4, 0]), "positive integers"),
        (lambda: Mask.documents([1.5]), "positive integers"),  # type: ignore[list-item]
        (lambda: Mask.causal(4, window=(-2, 0)), "window"),
        (lambda: Mask.full(4, window=(0, -7)), "-1 for unlimited"),
    ],
)
def test_impossible_masks_are_refused(make: Callable[[], Mask], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("window", [3, (1,), (1, 2, 3), (1.5, 0), ("a", 0), (-2, 0)])
def test_a_window_that_is_no_pair_of_bounds_is_refused(window: object) -> None:
    with pytest.raises(ConfigError, match="window"):
        Mask.causal(4, window=window)  # type: ignore[arg-type]
