"""Flash attention kernels: their windows, which count from another diagonal than bands do.

Shapes as in ``interface.py``.

A band counts from the first corner of a tile, a window from the last (Dao 2023, FlashAttention 2,
and its packages since 2.1): row i attends column j iff

    i + s - left <= j <= i + s + right,  s = num_keys - num_queries

A negative bound means unlimited. But a bound of at least num_keys is taken as unlimited too, and an
unlimited bound next to a limited one is taken as num_keys. If a tile has many more queries than
keys, that is a different mask:

    6 queries, 4 keys, j >= i - 3: left 1, right unlimited     1 1 1 0   <- cut, j <= 0 - 2 + 4
                                                               1 1 1 1
    Such a tile is split into sub-tiles: its rows are halved,  1 1 1 1
    with the columns that they attend, until a window means    1 1 1 1
    the same as the band.                                      0 1 1 1
                                                               0 0 1 1
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.kernels.interface import BackwardInputs, accumulation_dtype, cut, same_width
from cp_megatron.kernels.segments import Lengths, Segments
from cp_megatron.plan.tiling import Band


class FlashWindow(NamedTuple):
    """The mask arguments of a flash attention kernel; -1 means that a bound is unlimited."""

    causal: bool
    left: int
    right: int


def flash_window(band: Band, num_queries: int, num_keys: int) -> FlashWindow:
    """Translates the band of a trimmed tile.

    A trimmed tile has a key in its last row and a query in its last column, so no limited bound can
    be negative.
    """
    shift = num_keys - num_queries
    left = -1 if band.left is None else band.left + shift
    right = -1 if band.right is None else band.right - shift
    assert band.left is None or left >= 0, "tile is not trimmed"
    assert band.right is None or right >= 0, "tile is not trimmed"
    # The causal flag means the diagonal of the last corner, which is the band's on a square only.
    return FlashWindow(band.is_causal and num_queries == num_keys, left, right)


class SubTile(NamedTuple):
    """Rows ``q0:q1`` of a tile, the columns ``k0:k1`` that they attend, and the band there."""

    q0: int
    q1: int
    k0: int
    k1: int
    band: Band

    @property
    def rows(self) -> slice:
        """The rows, as an index."""
        return slice(self.q0, self.q1)

    @property
    def columns(self) -> slice:
        """The columns, as an index."""
        return slice(self.k0, self.k1)


@cache
def sub_tiles(band: Band, num_queries: int, num_keys: int) -> tuple[SubTile, ...]:
    """Splits a tile by rows until windows describe it; no row or column of a part is empty."""
    if _has_window(band, num_queries, num_keys):
        return (SubTile(0, num_queries, 0, num_keys, band),)
    found: list[SubTile] = []
    half = num_queries // 2
    for q0, q1 in ((0, half), (half, num_queries)):
        k0, k1 = band.columns(q0, q1, num_keys)
        for a, b, c, d, part in sub_tiles(band.within(q0, q1, k0, k1), q1 - q0, k1 - k0):
            found.append(SubTile(q0 + a, q0 + b, k0 + c, k0 + d, part))
    return tuple(found)


def _has_window(band: Band, num_queries: int, num_keys: int) -> bool:
    _, left, right = flash_window(band, num_queries, num_keys)
    if 0 <= right < num_keys:
        return True  # an unlimited left bound, taken as num_keys, excludes nothing
    if band.right is not None and band.right < num_keys - 1:
        return False
    return not 0 <= left < num_keys or num_queries <= num_keys + 1


class FlashKernel(ABC):
    """Shared code of the flash attention kernels: types, widths, windows and sub-tiles.

    Attributes:
        joins: whether its ops take tiles of several lengths in one call, in the layout of
            ``forward_many``.
    """

    joins: bool = True

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of the inputs; the kernel accumulates in float32 inside."""
        return dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel.forward``; out has the inputs' type."""
        tiles = sub_tiles(band, q.shape[1], k.shape[1])
        if len(tiles) == 1:
            return self._forward(q, k, v, band, scale)
        results = [
            self._forward(q[:, t.rows], k[:, t.columns], v[:, t.columns], t.band, scale)
            for t in tiles
        ]
        # [B, rows, H, E] and [B, H, rows] each -> [B, Q, H, E] and [B, H, Q]
        return torch.cat([out for out, _ in results], 1), torch.cat([lse for _, lse in results], 2)

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = sub_tiles(band, x.q.shape[1], x.k.shape[1])
        if len(tiles) == 1:
            return self._backward(x, band, scale)
        dq = torch.empty_like(x.q)
        exact = accumulation_dtype(x.k.dtype)
        dk, dv = (torch.zeros_like(y, dtype=exact) for y in (x.k, x.v))
        for t in tiles:
            part = x.part(t.rows, t.columns)
            dq[:, t.rows], part_dk, part_dv = self._backward(part, t.band, scale)
            dk[:, t.columns].add_(part_dk)
            dv[:, t.columns].add_(part_dv)
        return dq, dk.to(x.k.dtype), dv.to(x.v.dtype)

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``JoiningKernel.forward_many``.

        The ops take the rows of the batch one after the other, without a dim for it, and keep the
        lse by head, as [H, B * Q].
        """
        batch, v_dim = q.shape[0], v.shape[-1]
        q, k, v = same_width(*(y.flatten(0, 1) for y in (q, k, v)), multiple=8)
        window = flash_window(segments.run.band, *segments.longest)
        lengths = segments.lengths(batch, q.device)
        out, lse = self.call_forward(q, k, v, window, scale, lengths)
        # [B * Q, H, E] -> [B, Q, H, E] and [H, B * Q] -> [B, H, Q]
        lse = rearrange(lse, "h (b q) -> b h q", b=batch)
        return cut(out, v_dim).unflatten(0, (batch, -1)), lse

    def backward_many(
        self, x: BackwardInputs, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``JoiningKernel.backward_many``."""
        batch = x.q.shape[0]
        lse = rearrange(x.lse, "b h q -> h (b q)").contiguous()
        dout, q, k, v, out = (y.flatten(0, 1) for y in x[:5])
        flat = BackwardInputs(dout, q, k, v, out, lse)
        window = flash_window(segments.run.band, *segments.longest)
        lengths = segments.lengths(batch, x.q.device)
        grads = self.call_backward(flat.same_width(multiple=8), window, scale, lengths)
        # [B * Q, H, D] -> [B, Q, H, D]
        dq, dk, dv = (grad.unflatten(0, (batch, -1)) for grad in flat.cut(*grads))
        return dq, dk, dv

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        v_dim = v.shape[-1]
        q, k, v = same_width(q, k, v, multiple=8)
        window = flash_window(band, q.shape[1], k.shape[1])
        out, lse = self.call_forward(q, k, v, window, scale)
        return cut(out, v_dim), lse

    def _backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.same_width(multiple=8)._replace(lse=x.lse.contiguous())
        window = flash_window(band, x.q.shape[1], x.k.shape[1])
        return x.cut(*self.call_backward(wide, window, scale))

    @abstractmethod
    def call_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: FlashWindow,
        scale: float,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns out and lse; all widths are equal and multiples of 8.

        With ``lengths``, tensors have no batch dim: q, out [B * Q, H, D], k, v [B * K, G, D] and
        lse [H, B * Q].
        """

    @abstractmethod
    def call_backward(
        self, x: BackwardInputs, window: FlashWindow, scale: float, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv; all widths are equal and multiples of 8, and lse is contiguous.

        ``lengths`` as in ``call_forward``.
        """
