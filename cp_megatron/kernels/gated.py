"""Gated linear units, act(gate) * up (Shazeer 2020, arXiv:2002.05202), with SiLU or GELU.

GELU is the tanh form of Hendrycks and Gimpel (arXiv:1606.08415). Backward reads ``gate`` and ``up``
and computes the activation again, so no third tensor of their size is kept. On a GPU with Triton
forward and backward are one kernel each (``gated_triton.py``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Literal["silu", "gelu"]


class GatedKernels(NamedTuple):
    """The two directions of ``gated``; all tensors have one shape and type.

    Attributes:
        forward: gate, up -> act(gate) * up.
        backward: the gradient of the result, gate, up -> the gradients of gate and up.
    """

    forward: Callable[[Tensor, Tensor, Activation], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Activation], tuple[Tensor, Tensor]]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """act(x), in any shape."""
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up; both are of one shape and type. The result can be differentiated once."""
    if torch.compiler.is_compiling():  # the compiler fuses and differentiates it
        return activate(gate, activation) * up
    result: Tensor = _Gated.apply(gate, up, activation)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_kernels(gate.device.type).forward(gate, up, activation)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        backward = gated_kernels(gate.device.type).backward
        return *backward(grads[0], gate, up, ctx.activation), None


@cache
def gated_kernels(device_type: str) -> GatedKernels:
    """The fastest functions on a kind of device."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return GatedKernels(forward_eager, backward_eager)
    # The package is optional.
    from cp_megatron.kernels.gated_triton import backward_triton, forward_triton

    return GatedKernels(forward_triton, backward_triton)


def forward_eager(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``GatedKernels.forward`` in eager PyTorch."""
    return activate(gate, activation).mul_(up)


def backward_eager(
    grad: Tensor, gate: Tensor, up: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """``GatedKernels.backward`` in eager PyTorch, without a temporary tensor."""
    dup = activate(gate, activation).mul_(grad)
    dgate = grad * up
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    else:
        options = {"approximate": "tanh", "grad_input": dgate}
        torch.ops.aten.gelu_backward.grad_input(dgate, gate, **options)
    return dgate, dup
