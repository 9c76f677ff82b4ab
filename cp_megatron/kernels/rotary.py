"""Rotates pairs of channels by angles, in as few passes as the device allows.

Shapes: b batch, s sequence, n heads, d rotated channels of a head, D all channels of a head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cp_megatron.kernels.rotated_channels import RotatedChannels

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor | None, RotatedChannels], Tensor]
"""Rotates x [b, s, n, D] of any floating type by cos and sin [s, d/2], which have the type of sums,
and multiplies all channels by ``factor`` [s] or, if that is None, by 1.

The result has the type of x and is rounded once.
"""


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, channels: RotatedChannels
) -> Tensor:
    """``Rotate``, by the fastest function."""
    # torch.compile fuses the eager form by itself.
    kernel = rotate_eager if torch.compiler.is_compiling() else _kernel(x.device.type)
    return kernel(x, cos, sin, factor, channels)


@cache
def _kernel(device_type: str) -> Rotate:
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return rotate_eager
    # The package is optional.
    from cp_megatron.kernels.rotary_triton import rotate_triton

    return rotate_triton


def rotate_eager(
    x: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, channels: RotatedChannels
) -> Tensor:
    """``Rotate`` in eager PyTorch."""
    sin = -sin if channels.inverse else sin
    if factor is not None:
        exact = factor.to(cos.dtype).unsqueeze(-1)  # [s, 1]
        cos, sin = cos * exact, sin * exact
    width = 2 * cos.shape[-1]
    turned = slice(channels.start, channels.start + width)
    turn = _turn_neighbours if channels.interleaved else _turn_halves
    rotated = turn(x[..., turned].to(cos.dtype), cos, sin)
    if width == x.shape[-1]:
        return rotated.to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., turned] = rotated
    for rest in (slice(0, turned.start), slice(turned.stop, None)):
        if factor is None:
            out[..., rest] = x[..., rest]
        else:
            torch.mul(x[..., rest], factor[:, None, None], out=out[..., rest])
    return out


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[b, s, n, d] -> the same; channels i and i + d/2 are a pair."""
    # [b, s, n, d] -> [b, s, n, 2, d/2]; cos [s, 1, 1, d/2], sin [s, 1, d/2]
    pairs, sin = x.unflatten(-1, (2, -1)), sin.unsqueeze(1)
    out = pairs * cos[:, None, None]
    out[..., 0, :].addcmul_(pairs[..., 1, :], sin, value=-1)
    out[..., 1, :].addcmul_(pairs[..., 0, :], sin)
    return out.flatten(-2)


def _turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[b, s, n, d] -> the same; channels 2i and 2i + 1 are a pair, a complex number."""
    # [b, s, n, d] -> complex [b, s, n, d/2]; the angles [s, 1, d/2]
    numbers = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * torch.complex(cos, sin).unsqueeze(1)).flatten(-2)
