"""``merge_`` as one Triton kernel.

Shapes: B = batch, Q = queries, H = heads, E = value head dim; R = B Q H rows of E numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# How many numbers of ``out`` one program merges.
_BLOCK = 2048


def merge_triton_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """``merge_`` on a GPU. Each argument may be any view whose last dim has stride 1.

    Shapes are not checked.
    """
    batch, num_queries, num_heads, width = out.shape
    num_rows = batch * num_queries * num_heads
    columns = triton.next_power_of_2(width)
    rows = max(_BLOCK // columns, 1)
    # Triton launches on the current device, which may be another one than the tensors'.
    with torch.cuda.device_of(out):
        _merge[(triton.cdiv(num_rows, rows),)](
            *(out, lse, new_out, new_lse),
            *(num_rows, num_queries, num_heads, width),
            *out.stride()[:3],
            *lse.stride(),
            *new_out.stride()[:3],
            *new_lse.stride(),
            block_rows=rows,
            block_columns=columns,
        )


@triton.jit
def _merge(
    out: tl.tensor,
    lse: tl.tensor,
    new_out: tl.tensor,
    new_lse: tl.tensor,
    num_rows: tl.tensor,
    num_queries: tl.tensor,
    num_heads: tl.tensor,
    width: tl.tensor,
    out_b: tl.tensor,
    out_q: tl.tensor,
    out_h: tl.tensor,
    lse_b: tl.tensor,
    lse_h: tl.tensor,
    lse_q: tl.tensor,
    new_out_b: tl.tensor,
    new_out_q: tl.tensor,
    new_out_h: tl.tensor,
    new_lse_b: tl.tensor,
    new_lse_h: tl.tensor,
    new_lse_q: tl.tensor,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Merges block_rows rows of out; rows are numbered in (batch, query, head) order."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    live = row < num_rows
    head = row % num_heads
    query = row // num_heads % num_queries
    batch = row // num_heads // num_queries

    lse_at = lse + batch * lse_b + head * lse_h + query * lse_q
    new_lse_at = new_lse + batch * new_lse_b + head * new_lse_h + query * new_lse_q
    weight, merged = _merged_lse(tl.load(lse_at, live, 0.0), tl.load(new_lse_at, live, 0.0))
    tl.store(lse_at, merged, mask=live)

    column = tl.arange(0, block_columns)[None, :]
    inside = live[:, None] & (column < width)
    out_at = out + (batch * out_b + query * out_q + head * out_h)[:, None] + column
    new_out_at = new_out + (batch * new_out_b + query * new_out_q + head * new_out_h)[:, None]
    a = tl.load(out_at, mask=inside, other=0.0)
    b = tl.load(new_out_at + column, mask=inside, other=0.0).to(a.dtype)
    tl.store(out_at, _lerp(a, b, weight[:, None]), mask=inside)


@triton.jit
def _merged_lse(old: tl.tensor, new: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Returns the weight of the new result, and the lse of both."""
    new = new.to(old.dtype)
    gap = new - old
    # gap is NaN if both are -inf (no key on either side) or both +inf, or if either is NaN.
    known = gap == gap
    weight = tl.where(known, 1.0 / (1.0 + tl.exp(-gap)), 0.0)
    merged = tl.maximum(old, new) + tl.log(1.0 + tl.exp(-tl.abs(gap)))
    return weight, tl.where(known, merged, old + new)


@triton.jit
def _lerp(a: tl.tensor, b: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """Like torch.lerp, starts from the nearer end: weights 0 and 1 return that end exactly."""
    nearer_a = a + weight * (b - a)
    nearer_b = b - (b - a) * (1.0 - weight)
    return tl.where(weight < 0.5, nearer_a, nearer_b)
