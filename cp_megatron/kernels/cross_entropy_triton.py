"""The two passes of ``cross_entropy.py`` as Triton kernels, which compute in the type of sums.

Shapes: n tokens, v padded vocabulary; this rank has v/tp columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.logit_transform import VocabularyPart

# How many columns one program reads at once; 16 numbers a thread.
_BLOCK = 4096
_WARPS = 8


def statistics_triton(
    products: Tensor, labels: Tensor, part: VocabularyPart
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """``CrossEntropyKernels.statistics`` on a GPU. The products are only read."""
    num_rows = len(products)
    lse, target = products.new_empty(2, num_rows, dtype=accumulation_dtype(products.dtype))
    # Triton launches on the current device, which may be another one than the tensors'.
    with torch.cuda.device_of(products):
        _statistics[(num_rows,)](
            *(products, labels, lse, target),
            *(products.stride(0), part.first, part.num_valid),
            multiplier=part.transform.multiplier,
            softcap=part.transform.softcap,
            block=_block(part.num_valid),
            num_warps=_WARPS,
        )
    return lse, target, (products,)


def gradient_triton(
    kept: tuple[Tensor, ...], labels: Tensor, part: VocabularyPart, lse: Tensor, scale: Tensor
) -> Tensor:
    """``CrossEntropyKernels.gradient`` on a GPU, over the products and in their type."""
    (products,) = kept
    num_rows, width = products.shape
    block = _block(width)
    with torch.cuda.device_of(products):
        _gradient[(num_rows, triton.cdiv(width, block))](
            *(products, labels, lse, scale),
            *(products.stride(0), part.first, part.num_valid, width),
            multiplier=part.transform.multiplier,
            softcap=part.transform.softcap,
            block=block,
            num_warps=_WARPS,
        )
    return products


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(max(width, 1)))


# multiplier and softcap are constants of the kernels, because Triton would round arguments to
# float32.


@triton.jit
def _statistics(
    products: tl.tensor,
    labels: tl.tensor,
    lse: tl.tensor,
    target: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    num_valid: tl.tensor,
    multiplier: tl.constexpr,
    softcap: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Reads one row block by block: a running maximum, and the sum of exp(logit - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    row_at = products + row * stride
    exact: tl.constexpr = lse.dtype.element_ty
    highest = tl.full((), float("-inf"), exact)
    total = tl.full((), 0.0, exact)
    for start in range(0, num_valid, block):
        column = start + tl.arange(0, block)
        valid = column < num_valid
        read = tl.load(row_at + column, mask=valid, other=0.0).to(exact)
        logit, _ = _logit(read, multiplier, softcap)
        logit = tl.where(valid, logit, float("-inf"))
        higher = tl.maximum(highest, tl.max(logit, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logit - higher), 0)
        highest = higher
    tl.store(lse + row, highest + tl.log(total))

    local = tl.load(labels + row) - first
    here = (local >= 0) & (local < num_valid)
    hit, _ = _logit(tl.load(row_at + local, mask=here, other=0.0).to(exact), multiplier, softcap)
    tl.store(target + row, tl.where(here, hit, 0.0))


@triton.jit
def _gradient(
    products: tl.tensor,
    labels: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    num_valid: tl.tensor,
    width: tl.tensor,
    multiplier: tl.constexpr,
    softcap: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Overwrites one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    at = products + row * stride + column
    exact: tl.constexpr = lse.dtype.element_ty
    read = tl.load(at, mask=column < num_valid, other=0.0).to(exact)
    logit, slope = _logit(read, multiplier, softcap)
    softmax = tl.exp(logit - tl.load(lse + row)) * tl.load(scale + row)
    is_label = column == tl.load(labels + row) - first
    grad = (softmax - is_label.to(exact) * multiplier) * slope
    grad = tl.where(column < num_valid, grad, 0.0)
    tl.store(at, grad.to(products.dtype.element_ty), mask=column < width)


@triton.jit
def _logit(
    product: tl.tensor, multiplier: tl.constexpr, softcap: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The logit of a product, and its derivative by multiplier * product."""
    slope = tl.full(product.shape, 1.0, product.dtype)
    logit = product * multiplier
    if softcap is not None:
        # tanh(|y|) = (1 - e) / (1 + e) with e = exp(-2 |y|) overflows for no y.
        scaled = product * (multiplier / softcap)
        e = tl.exp(-2.0 * tl.abs(scaled))
        bounded = softcap * (1.0 - e) / (1.0 + e)
        logit = tl.where(scaled < 0, -bounded, bounded)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return logit, slope
