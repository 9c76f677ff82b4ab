"""PyTorch's fused CPU flash attention.

Shapes as in ``interface.py``; the op takes [B, heads, length, dim] views.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cp_megatron.kernels.interface import (
    BackwardInputs,
    accumulation_dtype,
    allowed,
    cut,
    same_width,
)
from cp_megatron.kernels.segments import Segments
from cp_megatron.kernels.windows import SubTile
from cp_megatron.plan.tiling import FULL, Band, Tile

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

KEY_BLOCK = 512  # keys that the op computes at once
CAUSAL_LEAF = 256  # causal tiles up to this length, or longer than KEY_BLOCK, are not cut
BELOW_LEAF = Band(right=CAUSAL_LEAF)  # of the rows that are cut off
STRIP_ROWS = 128
SHORT_TILE, JOINED_ROWS = 32, 64  # squares up to the first length are joined up to the second

Strip = tuple[SubTile, Tensor | None]
"""What one call of the op computes, and the op's bias."""


class CpuKernel:
    """Computes tiles of bfloat16 in float32.

    Partial results then stay float32 until the merge, so the sum over tiles is more exact than one
    bfloat16 kernel over the whole sequence. Besides, the op's bfloat16 backward is several times
    slower on processors without bfloat16 matrix units.

    The op computes whole blocks of 512 keys and masks the later ones, so half of the work of a
    causal tile of 512 is wasted. Therefore its first 256 rows are a call of their own. Longer tiles
    are one call, because the op leaves out the blocks after a row's own, and because what is wasted
    costs less than more calls: halving a row of 2,048 tokens takes 1.1 to 1.2 times as long.

    The op accepts bands that are not causal squares only as a bias of rows x columns. They are cut
    into strips of rows, each with the columns that it attends. The work is then rows x (window +
    strip), not rows x columns:

        x x . . . . . .        x x
        x x x . . . . .        x x x
        . x x x . . . .   =      x x x
        . . x x x . . .          . x x x

    A call has a price of its own, so short squares that lie next to one another are one call, with
    a bias that separates them. At 64 rows that takes half the time of squares of 16 rows one by
    one, and a tenth of that of squares of 2; at 256 rows, what is masked costs more than calls.
    """

    joins = True

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, or float64 for float64."""
        return accumulation_dtype(dtype)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        strips = _strips(band, q, k)
        if len(strips) == 1:
            return _call_forward(q, k, v, strips[0][0].band, scale, strips[0][1])
        return _forward_strips(strips, q, k, v, scale)

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        strips = _strips(band, x.q, x.k)
        if len(strips) == 1 and strips[0][0].k1 - strips[0][0].k0 == x.k.shape[1]:
            return _call_backward(x, strips[0][0].band, scale, strips[0][1])
        return _backward_strips(strips, x, scale)

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``JoiningKernel.forward_many``."""
        return _forward_strips(_strips_of_run(segments, q), q, k, v, scale)

    def backward_many(
        self, x: BackwardInputs, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``JoiningKernel.backward_many``."""
        return _backward_strips(_strips_of_run(segments, x.q), x, scale)


def _forward_strips(
    strips: Sequence[Strip], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, num_queries, num_heads, _ = q.shape
    out = q.new_empty((batch, num_queries, num_heads, v.shape[-1]))
    lse = q.new_empty((batch, num_heads, num_queries))
    for strip, bias in strips:
        rows, columns = strip.rows, strip.columns
        inputs = q[:, rows], k[:, columns], v[:, columns]
        out[:, rows], lse[:, :, rows] = _call_forward(*inputs, strip.band, scale, bias)
    return out, lse


def _backward_strips(
    strips: Sequence[Strip], x: BackwardInputs, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row belongs to one strip; strips are in the order of their rows and first columns.
    Those that share columns add up their gradients of keys."""
    dq, dk, dv = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x.q, x.k, x.v))
    written = x.k.shape[1]  # no gradient of keys before this column has been written
    # The last strip of a tile reads most of its columns, so little must be cleared before a sum.
    for strip, bias in reversed(strips):
        rows, columns = strip.rows, strip.columns
        dq[:, rows], *new = _call_backward(x.part(rows, columns), strip.band, scale, bias)
        for total, part in zip((dk, dv), new, strict=True):
            if strip.k1 <= written:
                total[:, columns] = part
                total[:, strip.k1 : written].zero_()
            else:
                total[:, strip.k0 : written].zero_()
                total[:, columns].add_(part)
        written = strip.k0
    for total in (dk, dv):
        total[:, :written].zero_()
    return dq, dk, dv


def cut_band(band: Band, num_keys: int, q0: int, q1: int) -> Iterator[SubTile]:
    """Cuts rows ``q0:q1`` of a tile into strips. Full parts and most causal squares stay whole.

    The band must leave every row a key.
    """
    rows = q1 - q0
    k0, k1 = band.columns(q0, q1, num_keys)
    part = SubTile(q0, q1, k0, k1, band.within(q0, q1, k0, k1))
    causal = part.band.is_causal and rows == k1 - k0
    if causal and CAUSAL_LEAF < rows <= KEY_BLOCK:
        middle, corner = q0 + CAUSAL_LEAF, k0 + CAUSAL_LEAF
        yield SubTile(q0, middle, k0, corner, part.band)
        yield SubTile(middle, q1, k0, k1, part.band.within(middle, q1, k0, k1))
        return
    if part.band.is_full or causal or rows <= STRIP_ROWS:
        yield part
        return
    # The upper part is a multiple of the strip, so that all strips but the last share one bias.
    middle = q0 + max(rows // 2 // STRIP_ROWS, 1) * STRIP_ROWS
    yield from cut_band(band, num_keys, q0, middle)
    yield from cut_band(band, num_keys, middle, q1)


def _strips(band: Band, q: Tensor, k: Tensor) -> list[Strip]:
    return list(_with_bias(cut_band(band, k.shape[1], 0, q.shape[1]), q))


def _with_bias(strips: Iterable[SubTile], like: Tensor) -> Iterator[Strip]:
    last: tuple[int, int, Band] | None = None
    bias: Tensor | None = None
    for strip in strips:
        alike = (strip.q1 - strip.q0, strip.k1 - strip.k0, strip.band)
        if alike != last:
            last, bias = alike, _bias(*alike, like)
        yield strip, bias


def _strips_of_run(segments: Segments, like: Tensor) -> list[Strip]:
    """The strips of the tiles of a run; short squares are joined."""
    (q_origin, _), (k_origin, _) = segments.run.rows, segments.run.columns

    def make() -> list[Strip]:
        found: list[Strip] = []
        for tiles in _packs(segments.run.tiles):
            first, last = tiles[0], tiles[-1]
            row, column = first.q0 - q_origin, first.k0 - k_origin
            num_rows, num_columns = last.q1 - first.q0, last.k1 - first.k0
            if len(tiles) > 1:
                square = SubTile(row, row + num_rows, column, column + num_columns, FULL)
                found.append((square, _separating_bias(tiles, like)))
                continue
            strips = cut_band(first.band, num_columns, 0, num_rows)
            for (a, b, c, d, band), bias in _with_bias(strips, like):
                found.append((SubTile(row + a, row + b, column + c, column + d, band), bias))
        return found

    return segments.once(("strips", like.dtype), make)


def _packs(tiles: Iterable[Tile]) -> list[list[Tile]]:
    """Groups neighbours that are short squares; any other tile is alone."""
    packs: list[list[Tile]] = []
    rows = JOINED_ROWS  # of the last pack
    for tile in tiles:
        size = tile.q1 - tile.q0
        short = size == tile.k1 - tile.k0 <= SHORT_TILE
        if short and rows + size <= JOINED_ROWS:
            packs[-1].append(tile)
            rows += size
        else:
            packs.append([tile])
            rows = size if short else JOINED_ROWS
    return packs


def _separating_bias(tiles: Sequence[Tile], like: Tensor) -> Tensor:
    """An additive mask of squares along the diagonal, each with its own band."""
    masks = [allowed(t.band, t.q1 - t.q0, t.k1 - t.k0, like.device) for t in tiles]
    return _additive(torch.block_diag(*masks).bool(), like.dtype)


def _bias(num_queries: int, num_keys: int, band: Band, like: Tensor) -> Tensor | None:
    """An additive mask for bands that the op's causal flag does not cover, in the op's type."""
    if band.is_full or (band.is_causal and num_queries == num_keys):
        return None
    if band == BELOW_LEAF and num_queries + CAUSAL_LEAF == num_keys <= KEY_BLOCK:
        return _below_leaf(like.dtype)[:num_queries, :num_keys]
    return _additive(allowed(band, num_queries, num_keys, like.device), like.dtype)


@cache
def _below_leaf(dtype: torch.dtype) -> Tensor:
    """The bias of the rows of a causal square below its first ones; shorter squares read less."""
    mask = allowed(BELOW_LEAF, KEY_BLOCK - CAUSAL_LEAF, KEY_BLOCK, torch.device("cpu"))
    return _additive(mask, dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``mask`` is True and -inf elsewhere, in the op's type.

    The memory is numpy's: it belongs to a plan, and a report of memory must not count it as
    activations of the layer that happens to run first.
    """
    width = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(np.where(mask.numpy(), 0, -np.inf).astype(width))


def _call_forward(
    q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    v_dim = v.shape[-1]
    causal = bias is None and band.is_causal
    q, k, v = same_width(*(x.transpose(1, 2) for x in (q, k, v)))
    out, lse = _forward(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return cut(out.transpose(1, 2), v_dim), lse


def _call_backward(
    x: BackwardInputs, band: Band, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    causal = bias is None and band.is_causal
    *wide, lse = x.same_width()
    dout, q, k, v, out = (y.transpose(1, 2) for y in wide)
    grads = _backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return x.cut(dq, dk, dv)
