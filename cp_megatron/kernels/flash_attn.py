"""The flash-attn package (FlashAttention 2). The only file that imports it.

Shapes as in ``interface.py``; the package takes them as they are.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch
from flash_attn import flash_attn_interface
from torch import Tensor

from cp_megatron.kernels.cuda import bottom_right_window
from cp_megatron.kernels.interface import cut, same_width
from cp_megatron.plan.tiles import Band


class FlashAttnKernel:
    """Calls the package's own forward and backward, which return and take the lse.

    Args:
        interface: the package's module ``flash_attn_interface``, or a double of it.
    """

    def __init__(self, interface: ModuleType | Any = flash_attn_interface) -> None:
        self._forward = interface._flash_attn_forward
        self._backward = interface._flash_attn_backward
        # Through 2.6 a window was one pair, since 2.7 two numbers.
        parameters = inspect.signature(self._forward).parameters
        self._split_window = "window_size_left" in parameters

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The package computes in the inputs' type and accumulates in float32 inside."""
        return dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel.forward``; out comes in the inputs' type."""
        v_dim = v.shape[-1]
        q, k, v = same_width(q, k, v)
        results = self._forward(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=scale,
            **self._mask(band, q, k),
            alibi_slopes=None,
            return_softmax=False,
            softcap=0.0,
        )
        if len(results) == 4:  # since 2.7: out, lse, debug mask, random state
            return cut(results[0], v_dim), results[1]
        return cut(results[0], v_dim), results[5]  # before: out, q, k, v, out padded, lse, ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        band: Band,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Kernel.backward``."""
        dim, v_dim = q.shape[-1], v.shape[-1]
        q, k, v, dout, out = same_width(q, k, v, dout, out)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        self._backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            dq,
            dk,
            dv,
            dropout_p=0.0,
            softmax_scale=scale,
            **self._mask(band, q, k),
            alibi_slopes=None,
            deterministic=False,
            softcap=0.0,
        )
        return cut(dq, dim), cut(dk, dim), cut(dv, v_dim)

    def _mask(self, band: Band, q: Tensor, k: Tensor) -> dict[str, Any]:
        num_queries, num_keys = q.shape[1], k.shape[1]
        left, right = bottom_right_window(band, num_queries, num_keys)
        # The flag means the last corner's diagonal; off a square the window alone says it.
        causal = band.is_causal and num_queries == num_keys
        if self._split_window:
            return {"causal": causal, "window_size_left": left, "window_size_right": right}
        return {"causal": causal, "window_size": (left, right)}
