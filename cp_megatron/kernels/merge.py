"""Merging two partial attentions of the same queries over different keys.

Shapes: B batch, Q queries, H heads, E value head dim.

With weights w = exp(lse_b) / (exp(lse_a) + exp(lse_b)) = sigmoid(lse_b - lse_a) the merged result
is out_a + w (out_b - out_a); no exponential of an lse itself is taken, so no size overflows.

Eager PyTorch needs six kernels and some temporaries. On a GPU with Triton it is one
(``merge_triton.py``), each number read and written once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Merge = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def merge_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Merges a tile's result into ``out`` and ``lse`` in place.

    Args:
        out: [B, Q, H, E], float32 or float64.
        lse: [B, H, Q], as ``out``; -inf where a row has seen no key yet.
        new_out: [B, Q, H, E], any float type.
        new_lse: [B, H, Q]; -inf where the tile has no key for a row.
    """
    fused = _fused() if out.is_cuda else None
    (fused or merge_eager_)(out, lse, new_out, new_lse)


def merge_eager_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """``merge_`` in PyTorch's own operations."""
    new_lse = new_lse.to(lse.dtype)
    # Both -inf: no keys on either side, the difference is NaN and the weight must be 0.
    weight = torch.sigmoid(torch.nan_to_num(new_lse - lse, nan=-torch.inf))
    out.lerp_(new_out.to(out.dtype), weight.transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(lse, new_lse, out=lse)


@cache
def _fused() -> Merge | None:
    """The Triton kernel, where that optional package is installed (PyTorch's CUDA wheels do)."""
    if importlib.util.find_spec("triton") is None:
        return None
    # Imported here because the package is optional and this is the one place that needs it.
    from cp_megatron.kernels.merge_triton import merge_triton_

    return merge_triton_
