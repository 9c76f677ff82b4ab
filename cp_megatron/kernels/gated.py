"""Gated linear units; ``gated_function.py`` says which functions they have.

Backward reads ``gate`` and ``up`` and computes the activation again, so no third tensor of their
size is kept. On a GPU with Triton forward and backward are one kernel each (``gated_triton.py``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.kernels.gated_function import QUICK
from cp_megatron.kernels.gated_function import Activation as Activation
from cp_megatron.kernels.gated_function import GatedFunction as GatedFunction


class GatedKernels(NamedTuple):
    """The two directions of ``gated``; all tensors have one shape and type.

    Attributes:
        forward: gate, up -> the result.
        backward: the gradient of the result, gate, up -> the gradients of gate and up.
    """

    forward: Callable[[Tensor, Tensor, GatedFunction], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, GatedFunction], tuple[Tensor, Tensor]]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """act(x), in any shape."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(QUICK * x)
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def gated(gate: Tensor, up: Tensor, function: GatedFunction) -> Tensor:
    """``function`` of two tensors of one shape and type. It can be differentiated once."""
    if torch.compiler.is_compiling():  # the compiler fuses and differentiates it
        x, factor = _bounded(gate, up, function)
        return activate(x, function.activation) * factor
    result: Tensor = _Gated.apply(gate, up, function)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, function: GatedFunction) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.function = function
        return gated_kernels(gate.device.type).forward(gate, up, function)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        backward = gated_kernels(gate.device.type).backward
        return *backward(grads[0], gate, up, ctx.function), None


@cache
def gated_kernels(device_type: str) -> GatedKernels:
    """The fastest functions on a kind of device."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return GatedKernels(forward_eager, backward_eager)
    # The package is optional.
    from cp_megatron.kernels.gated_triton import backward_triton, forward_triton

    return GatedKernels(forward_triton, backward_triton)


def forward_eager(gate: Tensor, up: Tensor, function: GatedFunction) -> Tensor:
    """``GatedKernels.forward`` in eager PyTorch."""
    gate, up = _bounded(gate, up, function)
    return activate(gate, function.activation).mul_(up)


def backward_eager(
    grad: Tensor, gate: Tensor, up: Tensor, function: GatedFunction
) -> tuple[Tensor, Tensor]:
    """``GatedKernels.backward`` in eager PyTorch; SiLU and GELU alone need no temporary tensor."""
    x, factor = _bounded(gate, up, function)
    dup = activate(x, function.activation).mul_(grad)
    dgate = grad * factor
    if function.activation == "gelu":
        options = {"approximate": "tanh", "grad_input": dgate}
        torch.ops.aten.gelu_backward.grad_input(dgate, x, **options)
    else:
        # x sigmoid(c x) = silu(c x) / c has the derivative of SiLU at c x.
        argument = x if function.activation == "silu" else QUICK * x
        torch.ops.aten.silu_backward.grad_input(dgate, argument, grad_input=dgate)
    if function.clamp is not None:
        dgate.masked_fill_(gate > function.clamp, 0)
        dup.masked_fill_(up.abs() > function.clamp, 0)
    return dgate, dup


def _bounded(gate: Tensor, up: Tensor, function: GatedFunction) -> tuple[Tensor, Tensor]:
    """The argument of the activation, and its factor."""
    if function.clamp is not None:
        gate, up = gate.clamp(max=function.clamp), up.clamp(-function.clamp, function.clamp)
    return gate, up + function.offset if function.offset else up
