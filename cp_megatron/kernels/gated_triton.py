"""``gated`` as one Triton kernel forward and one backward.

Both activations have the form act(x) = x sigmoid(z(x)): SiLU with z = x, and GELU in the tanh form
with z = 2 sqrt(2 / pi) (x + 0.044715 x^3), because (1 + tanh(u)) / 2 = sigmoid(2 u).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# How many numbers of each tensor one program reads.
_BLOCK = 2048


def forward_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up on a GPU, in tensors of any shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    # Triton launches on the current device, which may be another one than the tensors'.
    with torch.cuda.device_of(gate):
        _forward[(triton.cdiv(gate.numel(), _BLOCK),)](
            *(gate, up, out, gate.numel()), **_constants(gate, activation)
        )
    return out


def backward_triton(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up on a GPU."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        _backward[(triton.cdiv(gate.numel(), _BLOCK),)](
            *(grad, gate, up, dgate, dup, gate.numel()), **_constants(gate, activation)
        )
    return dgate, dup


def _constants(x: Tensor, activation: str) -> dict[str, object]:
    exact = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"is_gelu": activation == "gelu", "exact": exact, "block": _BLOCK}


@triton.jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    is_gelu: tl.constexpr,
    exact: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(exact)
    y = tl.load(up + at, mask=inside, other=0.0).to(exact)
    weight, _ = _sigmoid_and_slope(x, is_gelu)
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
    exact: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(exact)
    x = tl.load(gate + at, mask=inside, other=0.0).to(exact)
    y = tl.load(up + at, mask=inside, other=0.0).to(exact)
    weight, slope = _sigmoid_and_slope(x, is_gelu)
    # d act / dx = sigmoid(z) + x sigmoid(z) (1 - sigmoid(z)) dz / dx
    derivative = weight + x * weight * (1.0 - weight) * slope
    tl.store(dgate + at, (g * y * derivative).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (g * x * weight).to(dup.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid_and_slope(x: tl.tensor, is_gelu: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Returns sigmoid(z(x)) and dz / dx."""
    z = x
    slope = x * 0.0 + 1.0
    if is_gelu:
        # 1.5957691216057308 = 2 sqrt(2 / pi), and 0.134145 = 3 * 0.044715
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return 1.0 / (1.0 + tl.exp(-z)), slope
