"""``rms_norm`` and ``add_rms_norm`` as Triton kernels.

Shapes: R rows of h numbers, the vectors that are normalized; P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# How many numbers of each tensor one program reads at a time, if a row is not longer.
_BLOCK = 2048
# Each program of backward writes a row of h sums, so it gets several rows.
_LEAST_ROWS = 16
_PROGRAMS_PER_PROCESSOR = 4


def forward_triton(
    x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``NormKernels.forward`` on a GPU."""
    x, width = x.contiguous(), x.shape[-1]
    stream = x
    if added is not None:
        added = added.contiguous()
        dtype = torch.promote_types(x.dtype, added.dtype)
        stream = torch.empty(x.shape, dtype=dtype, device=x.device)
    out = torch.empty_like(stream)
    constants = _constants(stream)
    scale = stream.new_empty((*x.shape[:-1], 1), dtype=_exact(stream))
    num_rows = x.numel() // width
    # Triton launches on the current device, which may be another one than the tensors'.
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(num_rows, constants["block_rows"]),)](
            *(x, x if added is None else added, weight, stream, out, scale, num_rows, width),
            epsilon=epsilon,
            adds=added is not None,
            **constants,
        )
    return stream, out, scale


def backward_triton(
    dstream: Tensor | None, dout: Tensor, stream: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``NormKernels.backward`` on a GPU."""
    dout, stream, width = dout.contiguous(), stream.contiguous(), stream.shape[-1]
    constants = _constants(stream)
    block_rows, num_rows = constants["block_rows"], stream.numel() // width
    rows = max(_LEAST_ROWS, triton.cdiv(num_rows, _most_programs(stream)))
    rows = triton.cdiv(rows, block_rows) * block_rows
    programs = triton.cdiv(num_rows, rows)
    dx = torch.empty_like(stream)
    parts = stream.new_empty((programs, width), dtype=_exact(stream))
    with torch.cuda.device_of(stream):
        _backward[(programs,)](
            *(dout if dstream is None else dstream.contiguous(), dout, stream, weight, scale),
            *(dx, parts, num_rows, width, rows),
            adds=dstream is not None,
            **constants,
        )
    return dx, parts.sum(0).to(weight.dtype)  # [P, h] -> [h]


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _constants(x: Tensor) -> dict[str, int]:
    columns = triton.next_power_of_2(x.shape[-1])
    return {
        "exact": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "block_rows": max(1, _BLOCK // columns),
        "block_columns": columns,
        "num_warps": 4 if columns <= 2048 else 8 if columns <= 4096 else 16,
    }


def _most_programs(x: Tensor) -> int:
    if not x.is_cuda:
        return _PROGRAMS_PER_PROCESSOR
    processors: int = torch.cuda.get_device_properties(x.device).multi_processor_count
    return _PROGRAMS_PER_PROCESSOR * processors


@triton.jit
def _forward(
    x: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    stream: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    epsilon: tl.constexpr,
    adds: tl.constexpr,
    exact: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Normalizes block_rows rows of x, or of x + added, which it writes to stream."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_columns)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if adds:
        value = value.to(exact) + tl.load(added + at, mask=inside, other=0.0).to(exact)
        # The norm is that of the rounded sum, as if it were read from memory.
        value = value.to(stream.dtype.element_ty)
        tl.store(stream + at, value, mask=inside)
    value = value.to(exact)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + epsilon)
    tl.store(scale + row, inverse, mask=row < num_rows)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(exact)
    normalized = value * inverse[:, None] * factor[None, :]
    tl.store(out + at, normalized.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dstream: tl.tensor,
    dout: tl.tensor,
    stream: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    dx: tl.tensor,
    parts: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    adds: tl.constexpr,
    exact: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Differentiates ``rows`` rows, and adds up what they contribute to the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block_columns)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(exact)
    total = tl.zeros((block_columns,), dtype=exact)
    for start in range(0, rows, block_rows):
        row = program * rows + start + tl.arange(0, block_rows)
        live = row < num_rows
        inside = live[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        inverse = tl.load(scale + row, mask=live, other=0.0)[:, None]
        unit = tl.load(stream + at, mask=inside, other=0.0).to(exact) * inverse
        grad = tl.load(dout + at, mask=inside, other=0.0).to(exact)
        total += tl.sum(grad * unit, axis=0)
        grad = grad * factor[None, :]
        along = tl.sum(grad * unit, axis=1) / width
        result = (grad - unit * along[:, None]) * inverse
        if adds:
            result += tl.load(dstream + at, mask=inside, other=0.0).to(exact)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + program * width + column, total, mask=column < width)
