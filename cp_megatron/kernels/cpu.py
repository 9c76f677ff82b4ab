"""PyTorch's fused CPU flash attention.

Shapes as in ``interface.py``; the op takes [B, heads, length, dim] views.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

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
from cp_megatron.kernels.merge import merge_
from cp_megatron.kernels.segments import Segments
from cp_megatron.kernels.windows import SubTile
from cp_megatron.plan.tiling import FULL, Band, Tile

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

KEY_BLOCK = 512  # keys that the op computes at once
CAUSAL_LEAF = 256  # causal tiles up to this length are not split
STRIP_ROWS = 128
SHORT_TILE, JOINED_ROWS = 32, 64  # squares up to the first length are joined up to the second

Strip = tuple[SubTile, Tensor | None]
"""What one call of the op computes, or a causal square that is halved, and the op's bias."""


class CpuKernel:
    """Computes tiles of bfloat16 in float32.

    Partial results then stay float32 until the merge, so the sum over tiles is more exact than one
    bfloat16 kernel over the whole sequence. Besides, the op's bfloat16 backward is several times
    slower on processors without bfloat16 matrix units.

    The op computes whole blocks of 512 keys and masks the later ones, so half of the work of a
    causal tile of 512 is wasted. Therefore such a tile is halved:

        causal(n)  =  | causal(n/2)              |
                      | full(n/2)    causal(n/2) |

    Longer ones are one call, because the op leaves out the blocks after a row's own, and because
    what is wasted costs less than more calls: halving a row of 2,048 tokens takes 1.1 to 1.2 times
    as long.

    The op accepts other bands only as a bias of rows x columns. They are cut into strips of rows,
    each with the columns that it attends. The work is then rows x (window + strip), not rows x
    columns:

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
        if len(strips) == 1 and _middle(q, k, strips[0][0].band) is None:
            return _call_forward(q, k, v, strips[0][0].band, scale, strips[0][1])
        return _forward_strips(strips, q, k, v, scale)

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        strips = _strips(band, x.q, x.k)
        whole = len(strips) == 1 and strips[0][0].k1 - strips[0][0].k0 == x.k.shape[1]
        if whole and _middle(x.q, x.k, strips[0][0].band) is None:
            return _call_backward(x, strips[0][0].band, scale, strips[0][1])
        return _backward_strips(strips, x, scale, add=not whole)

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``JoiningKernel.forward_many``."""
        return _forward_strips(_strips_of_run(segments, q), q, k, v, scale)

    def backward_many(
        self, x: BackwardInputs, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``JoiningKernel.backward_many``."""
        strips = _strips_of_run(segments, x.q)
        # Only strips of the same tile have columns in common.
        disjoint = all(a.k1 <= b.k0 for (a, _), (b, _) in pairwise(strips))
        covered = sum(strip.k1 - strip.k0 for strip, _ in strips) == x.k.shape[1]
        return _backward_strips(strips, x, scale, add=not (disjoint and covered))


def _forward_strips(
    strips: Sequence[Strip], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, num_queries, num_heads, _ = q.shape
    out = q.new_empty((batch, num_queries, num_heads, v.shape[-1]))
    lse = q.new_empty((batch, num_heads, num_queries))
    for strip, bias in strips:
        rows, columns = strip.rows, strip.columns
        inputs = q[:, rows], k[:, columns], v[:, columns]
        _forward_strip(*inputs, strip.band, scale, bias, (out[:, rows], lse[:, :, rows]))
    return out, lse


def _backward_strips(
    strips: Sequence[Strip], x: BackwardInputs, scale: float, *, add: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Strips cover the columns once, unless gradients of keys ``add`` up over strips."""
    fill = torch.zeros if add else torch.empty
    dq = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
    dk, dv = (fill(y.shape, dtype=y.dtype, device=y.device) for y in (x.k, x.v))
    for strip, bias in strips:
        rows, columns = strip.rows, strip.columns
        grads = dq[:, rows], dk[:, columns], dv[:, columns]
        _backward_strip(x.part(rows, columns), strip.band, scale, bias, grads, add=add)
    return dq, dk, dv


def cut_band(band: Band, num_keys: int, q0: int, q1: int) -> Iterator[SubTile]:
    """Cuts rows ``q0:q1`` of a tile into strips. Full and square causal parts stay whole.

    The band must leave every row a key.
    """
    rows = q1 - q0
    k0, k1 = band.columns(q0, q1, num_keys)
    part = SubTile(q0, q1, k0, k1, band.within(q0, q1, k0, k1))
    causal = part.band.is_causal and rows == k1 - k0
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
    return _additive(torch.block_diag(*masks).bool(), like)


def _bias(num_queries: int, num_keys: int, band: Band, like: Tensor) -> Tensor | None:
    """An additive mask for bands that the op's causal flag does not cover, in the op's type."""
    if band.is_full or (band.is_causal and num_queries == num_keys):
        return None
    return _additive(allowed(band, num_queries, num_keys, like.device), like)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """0 where ``mask`` is True and -inf elsewhere, in the op's type.

    The memory is numpy's: it belongs to a plan, and a report of memory must not count it as
    activations of the layer that happens to run first.
    """
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return torch.from_numpy(np.where(mask.numpy(), 0, -np.inf).astype(dtype))


def _middle(q: Tensor, k: Tensor, band: Band) -> int | None:
    """Where to halve a causal square; None if the op takes the tile as it is."""
    length = q.shape[1]
    halves = CAUSAL_LEAF < length <= KEY_BLOCK
    return length // 2 if halves and band.is_causal and length == k.shape[1] else None


def _forward_strip(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    scale: float,
    bias: Tensor | None,
    results: tuple[Tensor, Tensor],
) -> None:
    """Writes out and lse. A causal square is halved; anything else is one call of the op."""
    middle = _middle(q, k, band)
    out, lse = results
    if middle is None:
        new_out, new_lse = _call_forward(q, k, v, band, scale, bias)
        out.copy_(new_out)
        lse.copy_(new_lse)
        return
    early, late = slice(0, middle), slice(middle, None)
    for half in (early, late):
        part = out[:, half], lse[:, :, half]
        _forward_strip(q[:, half], k[:, half], v[:, half], band, scale, None, part)
    full = _call_forward(q[:, late], k[:, early], v[:, early], FULL, scale, None)
    merge_(out[:, late], lse[:, :, late], *full)


def _backward_strip(
    x: BackwardInputs,
    band: Band,
    scale: float,
    bias: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    add: bool,
) -> None:
    """Writes dq; writes dk and dv, or adds to them. Halves tiles like ``_forward_strip``."""
    middle = _middle(x.q, x.k, band)
    dq, dk, dv = grads
    if middle is None:
        new_dq, new_dk, new_dv = _call_backward(x, band, scale, bias)
        dq.copy_(new_dq)
        for total, part in ((dk, new_dk), (dv, new_dv)):
            if add:
                total += part
            else:
                total.copy_(part)
        return
    early, late = slice(0, middle), slice(middle, None)
    for half in (early, late):
        own = dq[:, half], dk[:, half], dv[:, half]
        _backward_strip(x.part(half, half), band, scale, None, own, add=add)
    full = _call_backward(x.part(late, early), FULL, scale, None)
    for total, part in zip((dq[:, late], dk[:, early], dv[:, early]), full):
        total += part


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
