"""Bands in flash attention's words, which are windows around another diagonal.

A band is measured from a tile's first corner, a window from its last (Dao 2023, FlashAttention 2,
and its packages since 2.1): row i attends column j iff

    i + s - left <= j <= i + s + right,  s = num_keys - num_queries

A bound below zero means unlimited. But a bound of num_keys or more is taken for unlimited too, and
an unlimited one beside another that cuts for num_keys. Where a tile has many more queries than keys
that is another mask:

    6 queries, 4 keys, j >= i - 3: left 1, right unlimited     1 1 1 0   <- cut, j <= 0 - 2 + 4
                                                               1 1 1 1
    Such a tile is computed in sub_tiles: its rows are halved,     1 1 1 1
    with the columns that they see, until a window says        1 1 1 1
    what the band does.                                        0 1 1 1
                                                               0 0 1 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cp_megatron.kernels.interface import BackwardInputs, Kernel, accumulation_dtype
from cp_megatron.plan.tiling import Band


def bottom_right_window(band: Band, num_queries: int, num_keys: int) -> tuple[int, int]:
    """(left, right) of a band, -1 where it does not cut.

    A trimmed tile has a key in its last row and a query for its last column, so neither bound that
    cuts can be negative.
    """
    shift = num_keys - num_queries
    left = -1 if band.left is None else band.left + shift
    right = -1 if band.right is None else band.right - shift
    assert band.left is None or left >= 0, "tile is not trimmed"
    assert band.right is None or right >= 0, "tile is not trimmed"
    return left, right


@dataclass(frozen=True)
class SubTile:
    """Some rows of a tile and the columns that they see."""

    rows: slice
    columns: slice
    band: Band


@cache
def sub_tiles(band: Band, num_queries: int, num_keys: int) -> tuple[SubTile, ...]:
    """The tile, or what it is cut into, by rows; no row or column of a part is empty."""
    if _has_window(band, num_queries, num_keys):
        return (SubTile(slice(0, num_queries), slice(0, num_keys), band),)
    found = []
    half = num_queries // 2
    for q0, q1 in ((0, half), (half, num_queries)):
        k0 = 0 if band.left is None else max(0, q0 - band.left)
        k1 = num_keys if band.right is None else min(num_keys, q1 + band.right)
        left = None if band.left is None else band.left - q0 + k0
        right = None if band.right is None else band.right + q0 - k0
        if left is not None and left >= q1 - q0 - 1:
            left = None
        if right is not None and right >= k1 - k0 - 1:
            right = None
        for part in sub_tiles(Band(left, right), q1 - q0, k1 - k0):
            rows = slice(q0 + part.rows.start, q0 + part.rows.stop)
            columns = slice(k0 + part.columns.start, k0 + part.columns.stop)
            found.append(SubTile(rows, columns, part.band))
    return tuple(found)


def _has_window(band: Band, num_queries: int, num_keys: int) -> bool:
    left, right = bottom_right_window(band, num_queries, num_keys)
    if 0 <= right < num_keys:
        return True  # to the left num_keys cuts nothing
    if band.right is not None and band.right < num_keys - 1:
        return False
    return not 0 <= left < num_keys or num_queries <= num_keys + 1


class WindowedKernel:
    """A flash attention kernel that is asked only for what its windows say."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The kernel's own."""
        return self.kernel.compute_dtype(dtype)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel.forward``."""
        cut = sub_tiles(band, q.shape[1], k.shape[1])
        if len(cut) == 1:
            return self.kernel.forward(q, k, v, band, scale)
        found = [
            self.kernel.forward(q[:, p.rows], k[:, p.columns], v[:, p.columns], p.band, scale)
            for p in cut
        ]
        # [B, rows, H, E] and [B, H, rows] each -> [B, Q, H, E] and [B, H, Q]
        return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 2)

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Kernel.backward``."""
        cut = sub_tiles(band, x.q.shape[1], x.k.shape[1])
        if len(cut) == 1:
            return self.kernel.backward(x, band, scale)
        dq = torch.empty_like(x.q)
        exact = accumulation_dtype(x.k.dtype)
        dk, dv = (torch.zeros_like(y, dtype=exact) for y in (x.k, x.v))
        for p in cut:
            dq[:, p.rows], part_dk, part_dv = self.kernel.backward(
                x.part(p.rows, p.columns), p.band, scale
            )
            dk[:, p.columns] += part_dk
            dv[:, p.columns] += part_dv
        return dq, dk.to(x.k.dtype), dv.to(x.v.dtype)
