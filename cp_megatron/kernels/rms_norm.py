"""RMSNorm (Zhang, Sennrich 2019, arXiv:1910.07467), alone or of the sum of two tensors.

    y = x / r * weight,  r = sqrt(mean(x^2) + epsilon)

Backward, with g = dy * weight and u = x / r: dx = (g - u mean(g u)) / r. It keeps x and 1 / r, a
number per vector. On a GPU with Triton forward is one kernel and backward one and a sum over its
programs (``rms_norm_triton.py``); the sum of two tensors costs no pass of its own.

Sums are float32 (float64 for float64) whatever x and the weight are; the result has x's type.

Shapes: .. vectors, h their width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.kernels.interface import accumulation_dtype

_WIDEST_FUSED = 16384
"""A program of the Triton kernels holds whole vectors."""


class NormKernels(NamedTuple):
    """The two directions of a norm.

    Attributes:
        forward: x [.., h], what is added to it [.., h] or None, weight [h], epsilon -> the sum
            (x itself if nothing is added), its norm, and 1 / r [.., 1] in the type of sums.
        backward: the gradients of the sum (or None) and of the norm, the sum, weight, 1 / r -> the
            gradients of both summands, which are equal, and of the weight.
    """

    forward: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[Tensor | None, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """[.., h] and weight [h] -> [.., h], differentiable once."""
    if torch.compiler.is_compiling():
        return _compilable(x, weight, epsilon)
    result: Tensor = _RMSNorm.apply(x, None, weight, epsilon)
    return result


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + added and its ``rms_norm``, two tensors [.., h]."""
    if torch.compiler.is_compiling():
        total = x + added
        return total, _compilable(total, weight, epsilon)
    results: tuple[Tensor, Tensor] = _RMSNorm.apply(x, added, weight, epsilon)
    return results


def _compilable(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm in operations that the compiler fuses and differentiates."""
    exact = x.to(accumulation_dtype(x.dtype))
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return (exact * scale * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        forward = rms_norm_kernels(x.device.type, x.shape[-1]).forward
        stream, out, scale = forward(x, added, weight, epsilon)
        ctx.save_for_backward(stream, weight, scale)
        return out if added is None else (stream, out)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight, scale = ctx.saved_tensors
        dstream, dout = grads if len(grads) == 2 else (None, *grads)
        if dout is None:
            return dstream, dstream, None, None
        backward = rms_norm_kernels(stream.device.type, stream.shape[-1]).backward
        dx, dweight = backward(dstream, dout, stream, weight, scale)
        return dx, None if len(grads) == 1 else dx, dweight, None


@cache
def rms_norm_kernels(device_type: str, width: int) -> NormKernels:
    """The fastest functions for vectors of this width on a kind of device."""
    fuses = device_type == "cuda" and width <= _WIDEST_FUSED
    if not fuses or importlib.util.find_spec("triton") is None:
        return NormKernels(forward_eager, backward_eager)
    # The package is optional.
    from cp_megatron.kernels.rms_norm_triton import backward_triton, forward_triton

    return NormKernels(forward_triton, backward_triton)


def forward_eager(
    x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``NormKernels.forward`` in eager PyTorch; the squares and the result share their memory."""
    stream = x if added is None else x + added
    exact = stream.to(accumulation_dtype(stream.dtype))
    out = exact * exact
    scale = out.mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    torch.mul(exact, scale, out=out).mul_(weight)
    return stream, out.to(stream.dtype), scale


def backward_eager(
    dstream: Tensor | None, dout: Tensor, stream: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``NormKernels.backward`` in eager PyTorch.

    That of a LayerNorm whose mean is 0 computes (g - mean(g) - u mean(g u)) / r and the gradient of
    the weight in one pass, so mean(g) / r is added afterwards.
    """
    width, exact = weight.shape[0], accumulation_dtype(stream.dtype)
    dout, factor = dout.to(exact), weight.to(exact)
    zero = torch.zeros_like(scale)
    dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
        *(dout, stream.to(exact), weight.shape, zero, scale), factor, None, [True, True, False]
    )
    dx.add_((dout @ factor).unsqueeze(-1).mul_(scale).div_(width))
    if dstream is not None:
        dx.add_(dstream)
    return dx.to(stream.dtype), dweight.to(weight.dtype)
