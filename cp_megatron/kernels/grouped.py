"""Linears of several experts in one call: every expert multiplies the rows that were sent to it.

    rows of x, sorted by expert   | expert 0 | expert 1 | expert 3 |      expert 2 has none
    y                             | x W_0^T  | x W_1^T  | x W_3^T  |

One ``F.grouped_mm`` computes that where it takes the tensors: it needs a type other than float64,
rows that are a multiple of 16 bytes and, on a GPU, bfloat16 and compute capability 9.0, below which
it copies the offsets to the host. Elsewhere one product per expert writes into its slice of the
result. On a CPU both give the same bits.

Autograd through ``weight[e]`` would add up E gradients of the size of ``weight``. Backward here
allocates one, and every expert writes its slice.

Shapes: n rows, E experts, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ALIGNMENT = 16
"""Rows of the tensors of ``F.grouped_mm`` are a multiple of this many bytes."""


def grouped_linear(
    x: Tensor, weight: Tensor, counts: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Multiplies each expert's rows by its weight; can be differentiated once.

    Args:
        x: [n, i], sorted by expert.
        weight: [E, o, i] of the type of ``x``.
        counts: how many rows each expert has, E numbers on the host whose sum is n; 0 is fine.
        bias: [E, o], added to an expert's rows.

    Returns:
        [n, o].
    """
    assert (len(counts), sum(counts)) == (len(weight), len(x)), (weight.shape, x.shape)
    result: Tensor = _GroupedLinear.apply(x, weight, bias, tuple(counts))
    return result


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: tuple[int, ...]
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = _times_matrices(x, weight.transpose(1, 2), counts)
        if bias is not None:
            for rows, number in zip(y.split(counts), bias.unbind()):
                rows.add_(number)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy, counts = grads[0].contiguous(), ctx.counts
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = _times_matrices(dy, weight, counts) if needs_x else None
        dweight = _outer_products(dy, x, counts) if needs_weight else None
        dbias = _sums(dy, counts) if needs_bias else None
        return dx, dweight, dbias, None


def _times_matrices(x: Tensor, matrices: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[n, i] and [E, i, o], of which one of the last two dims has stride 1 -> [n, o]."""
    if _grouped_product_takes(x, matrices):
        return F.grouped_mm(x, matrices, offs=_ends(counts, x.device))
    y = x.new_empty(len(x), matrices.shape[2])
    for rows, matrix, out in zip(x.split(counts), matrices.unbind(), y.split(counts)):
        if len(rows):
            torch.mm(rows, matrix, out=out)
    return y


def _outer_products(dy: Tensor, x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """dy [n, o] and x [n, i] -> dy^T x of each expert, [E, o, i]; 0 for an expert without rows."""
    if _grouped_product_takes(x, dy):
        dweight = F.grouped_mm(dy.t(), x, offs=_ends(counts, x.device))
    else:
        dweight = x.new_empty(len(counts), dy.shape[1], x.shape[1])
        for left, right, out in zip(dy.split(counts), x.split(counts), dweight.unbind()):
            if len(left):
                torch.mm(left.t(), right, out=out)
    for count, out in zip(counts, dweight.unbind()):
        if not count:
            out.zero_()
    return dweight


def _sums(dy: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[n, o] -> the sum of each expert's rows, [E, o]."""
    sums = dy.new_zeros(len(counts), dy.shape[1])
    for rows, out in zip(dy.split(counts), sums.unbind()):
        if len(rows):
            torch.sum(rows, 0, out=out)
    return sums


def _grouped_product_takes(*tensors: Tensor) -> bool:
    """Whether one ``F.grouped_mm`` computes a product of these tensors without a copy."""
    first = tensors[0]
    if not len(first) or first.dtype == torch.float64:
        return False
    if first.is_cuda and (
        first.dtype != torch.bfloat16 or torch.cuda.get_device_capability(first.device) < (9, 0)
    ):
        return False
    return all(map(_is_aligned, tensors))


def _is_aligned(x: Tensor) -> bool:
    """Whether one of the last two dims has stride 1, and everything else starts at a boundary."""
    *outer, rows, columns = x.stride()
    if rows == 1:
        rows, columns = columns, rows
    starts = [stride * x.element_size() for stride in (*outer, rows)]
    packed = columns == 1 and rows >= max(1, min(x.shape[-2:]))
    return packed and not any(start % _ALIGNMENT for start in (x.data_ptr(), *starts))


def _ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [E]: where each expert's rows end. The host does not wait for the device."""
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
    return ends.to(device, non_blocking=True)
