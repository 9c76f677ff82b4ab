"""``gated`` as one Triton kernel forward and one backward.

All activations have the form act(x) = x sigmoid(z(x)): SiLU with z = x, ``quick_gelu`` with
z = 1.702 x, and GELU in the tanh form with z = 2 sqrt(2 / pi) (x + 0.044715 x^3), because
(1 + tanh(u)) / 2 = sigmoid(2 u).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cp_megatron.kernels.gated_function import QUICK, GatedFunction

# How many numbers of each tensor one program reads.
_BLOCK = 2048


def forward_triton(gate: Tensor, up: Tensor, function: GatedFunction) -> Tensor:
    """``function`` on a GPU, in tensors of any shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    # Triton launches on the current device, which may be another one than the tensors'.
    with torch.cuda.device_of(gate):
        _forward[(triton.cdiv(gate.numel(), _BLOCK),)](
            *(gate, up, out, gate.numel()), **_constants(gate, function)
        )
    return out


def backward_triton(
    grad: Tensor, gate: Tensor, up: Tensor, function: GatedFunction
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up on a GPU."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        _backward[(triton.cdiv(gate.numel(), _BLOCK),)](
            *(grad, gate, up, dgate, dup, gate.numel()), **_constants(gate, function)
        )
    return dgate, dup


def _constants(x: Tensor, function: GatedFunction) -> dict[str, object]:
    return {
        "is_gelu": function.activation == "gelu",
        "steepness": QUICK if function.activation == "quick_gelu" else 1.0,
        "clamps": function.clamp is not None,
        "clamp": function.clamp or 0.0,
        "offset": function.offset,
        "exact": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "block": _BLOCK,
    }


@triton.jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
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
    x = tl.load(gate + at, mask=inside, other=0.0).to(exact)
    y = tl.load(up + at, mask=inside, other=0.0).to(exact)
    if clamps:
        # Unlike a minimum, a comparison keeps NaN.
        x = tl.where(x > clamp, clamp, x)
        y = tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))
    if offset != 0.0:
        y += offset
    weight, _ = _sigmoid_and_slope(x, is_gelu, steepness)
    tl.store(out + at, (x * weight * y).to(out.dtype.element_ty), mask=inside)


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
    g_x = g
    g_y = g
    if clamps:
        # No gradient passes through a factor beyond its bound.
        g_x = tl.where(x > clamp, 0.0, g)
        g_y = tl.where(tl.abs(y) > clamp, 0.0, g)
        x = tl.where(x > clamp, clamp, x)
        y = tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))
    if offset != 0.0:
        y += offset
    weight, slope = _sigmoid_and_slope(x, is_gelu, steepness)
    # d act / dx = sigmoid(z) + x sigmoid(z) (1 - sigmoid(z)) dz / dx
    derivative = weight + x * weight * (1.0 - weight) * slope
    tl.store(dgate + at, (g_x * y * derivative).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (g_y * x * weight).to(dup.dtype.element_ty), mask=inside)


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
