"""``Rotate`` of ``rotary.py`` as one Triton kernel, which computes in the type of cos and sin.

Shapes: b batch, s sequence, n heads, d rotated channels of a head, D all channels of a head; R =
b s n rows of D numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cp_megatron.kernels.rotated_channels import RotatedChannels

# How many numbers one program rotates.
_BLOCK = 2048


def rotate_triton(
    x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, channels: RotatedChannels
) -> Tensor:
    """``Rotate`` on a GPU."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, length, num_heads, width = x.shape
    num_rows = batch * length * num_heads
    columns = triton.next_power_of_2(width)
    rows = max(_BLOCK // columns, 1)
    # Triton launches on the current device, which may be another one than the tensors'.
    with torch.cuda.device_of(x):
        _rotate[(triton.cdiv(num_rows, rows),)](
            *(x, cos.contiguous(), sin.contiguous(), factor, out),
            *(num_rows, length, num_heads, width, cos.shape[-1], channels.start),
            *x.stride()[:3],
            interleaved=channels.interleaved,
            inverse=channels.inverse,
            block_rows=rows,
            block_columns=columns,
        )
    return out


@triton.jit
def _rotate(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    factor: tl.tensor | None,
    out: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    num_heads: tl.tensor,
    width: tl.tensor,
    num_pairs: tl.tensor,
    start: tl.tensor,
    x_b: tl.tensor,
    x_s: tl.tensor,
    x_h: tl.tensor,
    interleaved: tl.constexpr,
    inverse: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Rotates block_rows rows; rows are numbered in (batch, token, head) order."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    token = row // num_heads % length
    batch = row // num_heads // length
    column = tl.arange(0, block_columns)[None, :]
    live = row[:, None] < num_rows
    inside = live & (column < width)
    turned = inside & (column >= start) & (column < start + 2 * num_pairs)

    pair, partner, sign = _partner(column - start, num_pairs, interleaved, inverse)
    x_at = x + (batch * x_b + token * x_s + row % num_heads * x_h)[:, None]
    angle_at = token[:, None] * num_pairs + pair
    c = tl.load(cos + angle_at, mask=turned, other=1.0)
    s = tl.load(sin + angle_at, mask=turned, other=0.0)
    own = tl.load(x_at + column, mask=inside, other=0.0).to(c.dtype)
    other = tl.load(x_at + start + partner, mask=turned, other=0.0).to(c.dtype)
    rotated = own * c + other * (s * sign)
    if factor is not None:
        times = tl.load(factor + token, mask=row < num_rows, other=1.0).to(c.dtype)
        rotated = rotated * times[:, None]
    out_at = out + row[:, None] * width + column
    tl.store(out_at, rotated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _partner(
    channel: tl.tensor, num_pairs: tl.tensor, interleaved: tl.constexpr, inverse: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns the pair of each rotated channel, the other channel of the pair, and the sign of the
    sine that this one is multiplied by."""
    if interleaved:
        pair = channel // 2
        is_second = channel % 2 == 1
        partner = tl.where(is_second, channel - 1, channel + 1)
    else:
        is_second = channel >= num_pairs
        pair = tl.where(is_second, channel - num_pairs, channel)
        partner = tl.where(is_second, pair, channel + num_pairs)
    return pair, partner, tl.where(is_second != inverse, 1.0, -1.0)
