"""``gated`` as one Triton kernel forward and one backward.

All activations have the form act(x) = x sigmoid(z(x)): SiLU with z = x, ``quick_gelu`` with
z = 1.702 x, and GELU in the tanh form with z = 2 sqrt(2 / pi) (x + 0.044715 x^3), because
(1 + tanh(u)) / 2 = sigmoid(2 u).

A program computes a block of numbers. Only backward with weights of the rows has a program for each
row, so that the gradient of its weight is summed in one order.

Shapes: m rows, f their width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cp_megatron.kernels.gated_function import QUICK, GatedFunction

# How many numbers of each tensor one program reads at a time, at most.
_BLOCK = 2048


def forward_triton(
    gate: Tensor, up: Tensor, function: GatedFunction, weights: Tensor | None
) -> Tensor:
    """``function`` on a GPU, in tensors of any shape; [m, f] with ``weights``, [m]."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    options, weighted = _constants(gate, function, weights), weights is not None
    factors = gate if weights is None else weights.contiguous()
    # Triton launches on the current device, which may be another one than the tensors'.
    with torch.cuda.device_of(gate):
        _forward[(triton.cdiv(gate.numel(), _BLOCK),)](
            *(gate, up, factors, out, gate.numel(), gate.shape[-1]),
            weighted=weighted,
            block=_BLOCK,
            **options,
        )
    return out


def backward_triton(
    grad: Tensor, gate: Tensor, up: Tensor, function: GatedFunction, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate, up and weights on a GPU."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, dweights = torch.empty_like(gate), torch.empty_like(up), None
    options = _constants(gate, function, weights)
    with torch.cuda.device_of(gate):
        if weights is None:
            grid = (triton.cdiv(gate.numel(), _BLOCK),)
            tensors = (grad, gate, up, dgate, dup)
            _backward[grid](*tensors, gate.numel(), block=_BLOCK, **options)
        else:
            width, weights = gate.shape[1], weights.contiguous()
            dweights = torch.zeros_like(weights)
            block = min(_BLOCK, triton.next_power_of_2(max(width, 1)))
            rows = (grad, gate, up, weights, dgate, dup, dweights)
            if gate.numel():
                _backward_rows[(len(gate),)](*rows, width, block=block, **options)
    return dgate, dup, dweights


def _constants(x: Tensor, function: GatedFunction, weights: Tensor | None) -> dict[str, object]:
    doubles = torch.float64 in (x.dtype, None if weights is None else weights.dtype)
    return {
        "is_gelu": function.activation == "gelu",
        "steepness": QUICK if function.activation == "quick_gelu" else 1.0,
        "clamps": function.clamp is not None,
        "clamp": function.clamp or 0.0,
        "offset": function.offset,
        "exact": tl.float64 if doubles else tl.float32,
    }


@triton.jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    weighted: tl.constexpr,
    is_gelu: tl.constexpr,
    steepness: tl.constexpr,
    clamps: tl.constexpr,
    clamp: tl.constexpr,
    offset: tl.constexpr,
    exact: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(exact)
    y = tl.load(up + at, mask=inside, other=0.0).to(exact)
    x, y = _bounded(x, y, clamps, clamp, offset)
    weight, _ = _sigmoid_and_slope(x, is_gelu, steepness)
    value = x * weight * y
    if weighted:
        value *= tl.load(weights + at // width, mask=inside, other=0.0).to(exact)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    count: tl.tensor,
    is_gelu: tl.constexpr,
    steepness: tl.constexpr,
    clamps: tl.constexpr,
    clamp: tl.constexpr,
    offset: tl.constexpr,
    exact: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(exact)
    x = tl.load(gate + at, mask=inside, other=0.0).to(exact)
    y = tl.load(up + at, mask=inside, other=0.0).to(exact)
    g_x, g_y, _ = _gradients(g, x, y, is_gelu, steepness, clamps, clamp, offset)
    tl.store(dgate + at, g_x.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, g_y.to(dup.dtype.element_ty), mask=inside)


@triton.jit
def _backward_rows(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    weights: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    dweights: tl.tensor,
    width: tl.tensor,
    is_gelu: tl.constexpr,
    steepness: tl.constexpr,
    clamps: tl.constexpr,
    clamp: tl.constexpr,
    offset: tl.constexpr,
    exact: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(weights + row).to(exact)
    total = tl.zeros((block,), exact)
    for first in range(0, width, block):
        column = first + tl.arange(0, block)
        at, inside = row * width + column, column < width
        g = tl.load(grad + at, mask=inside, other=0.0).to(exact)
        x = tl.load(gate + at, mask=inside, other=0.0).to(exact)
        y = tl.load(up + at, mask=inside, other=0.0).to(exact)
        g_x, g_y, value = _gradients(g, x, y, is_gelu, steepness, clamps, clamp, offset)
        total += tl.where(inside, g * value, 0.0)
        tl.store(dgate + at, (g_x * factor).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dup + at, (g_y * factor).to(dup.dtype.element_ty), mask=inside)
    tl.store(dweights + row, tl.sum(total).to(dweights.dtype.element_ty))


@triton.jit
def _bounded(
    x: tl.tensor, y: tl.tensor, clamps: tl.constexpr, clamp: tl.constexpr, offset: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The argument of the activation, and its factor."""
    if clamps:
        # Unlike a minimum, a comparison keeps NaN.
        x = tl.where(x > clamp, clamp, x)
        y = tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))
    if offset != 0.0:
        y += offset
    return x, y


@triton.jit
def _gradients(
    g: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    is_gelu: tl.constexpr,
    steepness: tl.constexpr,
    clamps: tl.constexpr,
    clamp: tl.constexpr,
    offset: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns the gradients of gate and up, and the result."""
    g_x = g
    g_y = g
    if clamps:
        # No gradient passes through a factor beyond its bound.
        g_x = tl.where(x > clamp, 0.0, g)
        g_y = tl.where(tl.abs(y) > clamp, 0.0, g)
    x, y = _bounded(x, y, clamps, clamp, offset)
    weight, slope = _sigmoid_and_slope(x, is_gelu, steepness)
    # d act / dx = sigmoid(z) + x sigmoid(z) (1 - sigmoid(z)) dz / dx
    derivative = weight + x * weight * (1.0 - weight) * slope
    return g_x * y * derivative, g_y * x * weight, x * weight * y


@triton.jit
def _sigmoid_and_slope(
    x: tl.tensor, is_gelu: tl.constexpr, steepness: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns sigmoid(z(x)) and dz / dx."""
    z = x * steepness
    slope = x * 0.0 + steepness
    if is_gelu:
        # 1.5957691216057308 = 2 sqrt(2 / pi), and 0.134145 = 3 * 0.044715
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return 1.0 / (1.0 + tl.exp(-z)), slope
