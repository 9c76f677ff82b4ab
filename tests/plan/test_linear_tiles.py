"""Tiles of heads: they cover all heads, share key heads in order, and fit into their memory."""

from __future__ import annotations

from unittest import mock

import pytest

from cp_megatron.plan import linear_tiles
from cp_megatron.plan.linear_tiles import head_tiles, temporary_bytes

SIZES = 128, 128, 2048, 4, 64


@pytest.mark.parametrize("heads", [(8, 8), (32, 16), (6, 1), (12, 2), (3, 3)])
@pytest.mark.parametrize("fit", [0, 1, 2, 3, 5, 100])
def test_tiles_cover_the_heads(heads: tuple[int, int], fit: int) -> None:
    of_head = temporary_bytes(*SIZES, per_channel=False)
    with mock.patch.object(linear_tiles, "TILE_BYTES", fit * of_head + 1):
        tiles = head_tiles(*heads, *SIZES, per_channel=False)
    group = heads[0] // heads[1]
    assert [head for (a, b), _ in tiles for head in range(a, b)] == list(range(heads[0]))
    for (start, stop), (first, last) in tiles:
        assert stop - start <= max(1, fit)
        assert {head // group for head in range(start, stop)} == set(range(first, last))
        # A tile repeats its key heads evenly.
        assert (stop - start) % (last - first) == 0
        assert start % group == 0 if last - first > 1 else True


def test_a_decay_per_channel_takes_more() -> None:
    assert temporary_bytes(*SIZES, per_channel=True) > temporary_bytes(*SIZES, per_channel=False)
