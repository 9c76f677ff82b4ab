"""Merging two partial attentions of the same queries over different keys.

Shapes: B = batch, Q = queries, H = heads, E = value head dim.

With the weight w = exp(lse_b) / (exp(lse_a) + exp(lse_b)) = sigmoid(lse_b - lse_a), the merged
result is out_a + w (out_b - out_a). No lse is exponentiated, so no size overflows.

Eager PyTorch needs six kernels and temporaries. On a GPU with Triton one kernel
(``merge_triton.py``) reads and writes each number once.
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
        lse: [B, H, Q], in the type of ``out``; -inf for a row without a key so far.
        new_out: [B, Q, H, E], any float type.
        new_lse: [B, H, Q]; -inf for a row without a key in the tile.
    """
    fused = _fused() if out.is_cuda else None
    (fused or merge_eager_)(out, lse, new_out, new_lse)


def merge_eager_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """``merge_`` in eager PyTorch."""
    new_lse = new_lse.to(lse.dtype)
    # If both are -inf, there are no keys on either side: the NaN must become a weight of 0.
    weight = torch.sigmoid(torch.nan_to_num(new_lse - lse, nan=-torch.inf))
    out.lerp_(new_out.to(out.dtype), weight.transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(lse, new_lse, out=lse)


@cache
def _fused() -> Merge | None:
    if importlib.util.find_spec("triton") is None:
        return None
    # The package is optional.
    from cp_megatron.kernels.merge_triton import merge_triton_

    return merge_triton_
