"""Gated linear units; ``gated_function.py`` says which functions they have.

Backward reads ``gate`` and ``up`` and computes the activation again, so no third tensor of their
size is kept. On a GPU with Triton forward and backward are one kernel each (``gated_triton.py``).

The rows of a mixture of experts are multiplied by the weights that the router gave them::

    w down(x) = down(w x)

so a row is multiplied here, where it is narrow if experts are, and what ``down`` computes is not
kept for the gradient of w.

Shapes: ``gate``, ``up`` and the result have one shape and type. With weights, [m], it is [m, f].
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
    """The two directions of ``gated``.

    Attributes:
        forward: gate, up, function, weights -> the result.
        backward: the gradient of the result, gate, up, function, weights -> the gradients of gate,
            up and weights.
    """

    forward: Callable[[Tensor, Tensor, GatedFunction, Tensor | None], Tensor]
    backward: Callable[
        [Tensor, Tensor, Tensor, GatedFunction, Tensor | None],
        tuple[Tensor, Tensor, Tensor | None],
    ]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """act(x), in any shape."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(QUICK * x)
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def gated(
    gate: Tensor, up: Tensor, function: GatedFunction, weights: Tensor | None = None
) -> Tensor:
    """``function`` of two tensors; it can be differentiated once.

    Args:
        gate, up: see the top of the file.
        function: what is computed.
        weights: [m], the factors of the rows, of any type.
    """
    if torch.compiler.is_compiling():  # the compiler fuses and differentiates it
        assert weights is None, "experts are not compiled"
        x, factor = _bounded(gate, up, function)
        return activate(x, function.activation) * factor
    result: Tensor = _Gated.apply(gate, up, function, weights)
    return result


def weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """rows [m, f] times weights [m], computed in the type of the weights, in the type of rows.

    It can be differentiated once.
    """
    result: Tensor = _Weighted.apply(rows, weights)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, function: GatedFunction, weights: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate, up, weights)
        ctx.function = function
        return gated_kernels(gate.device.type).forward(gate, up, function, weights)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weights = ctx.saved_tensors
        backward = gated_kernels(gate.device.type).backward
        dgate, dup, dweights = backward(grads[0], gate, up, ctx.function, weights)
        return dgate, dup, None, dweights


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return _times(rows, weights)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows, weights = ctx.saved_tensors
        return _times(grads[0], weights), _row_products(grads[0], rows, weights.dtype)


@cache
def gated_kernels(device_type: str) -> GatedKernels:
    """The fastest functions on a kind of device."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return GatedKernels(forward_eager, backward_eager)
    # The package is optional.
    from cp_megatron.kernels.gated_triton import backward_triton, forward_triton

    return GatedKernels(forward_triton, backward_triton)


def forward_eager(
    gate: Tensor, up: Tensor, function: GatedFunction, weights: Tensor | None
) -> Tensor:
    """``GatedKernels.forward`` in eager PyTorch."""
    gate, up = _bounded(gate, up, function)
    out = activate(gate, function.activation).mul_(up)
    return out if weights is None else out.mul_(weights[:, None])


def backward_eager(
    grad: Tensor, gate: Tensor, up: Tensor, function: GatedFunction, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``GatedKernels.backward`` in eager PyTorch; plain SiLU and GELU need no temporary."""
    x, factor = _bounded(gate, up, function)
    dup = activate(x, function.activation).mul_(grad)
    dgate, dweights = grad * factor, None
    if weights is not None:
        dweights = _row_products(dup, factor, weights.dtype)
        dup.mul_(weights[:, None])
        dgate.mul_(weights[:, None])
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
    return dgate, dup, dweights


def _times(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.mul(rows, weights[:, None], out=torch.empty_like(rows))


def _row_products(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """[m]: the scalar product of each row of x and y, [m, f]."""
    return torch.linalg.vecdot(x.to(dtype), y.to(dtype))


def _bounded(gate: Tensor, up: Tensor, function: GatedFunction) -> tuple[Tensor, Tensor]:
    """The argument of the activation, and its factor."""
    if function.clamp is not None:
        gate, up = gate.clamp(max=function.clamp), up.clamp(-function.clamp, function.clamp)
    return gate, up + function.offset if function.offset else up
