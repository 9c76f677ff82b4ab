"""PyTorch's fused CUDA flash attention (FlashAttention 2; 3 or 4 where activated in PyTorch).

``torch.nn.attention.activate_flash_attention_impl("FA3")`` (or "FA4") puts those kernels behind
these same ops, and ``cuda`` then runs them.

Shapes as in ``interface.py``; the op takes them as they are, [B, length, heads, dim].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cp_megatron.kernels.interface import BackwardInputs, cut, same_width
from cp_megatron.kernels.windows import bottom_right_window
from cp_megatron.plan.tiling import Band

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


class CudaKernel:
    """The low-level op rather than ``_scaled_dot_product_flash_attention``: it has windows.

    Args:
        deterministic: sum dQ in a fixed order. The op has no argument for it and reads PyTorch's
            global switch, which is therefore on during the call and put back after it.
    """

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The op computes in the inputs' type and accumulates in float32 inside."""
        return dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel.forward``; out comes in the inputs' type."""
        v_dim = v.shape[-1]
        q, k, v = same_width(q, k, v, multiple=8)
        num_queries, num_keys = q.shape[1], k.shape[1]
        left, right = bottom_right_window(band, num_queries, num_keys)
        out, lse, *_ = _forward(
            q,
            k,
            v,
            None,
            None,
            num_queries,
            num_keys,
            0.0,
            band.is_causal and num_queries == num_keys,
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return cut(out, v_dim), lse

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Kernel.backward``."""
        dout, q, k, v, out, lse = x.same_width(multiple=8)
        num_queries, num_keys = q.shape[1], k.shape[1]
        left, right = bottom_right_window(band, num_queries, num_keys)
        # The random state is read for dropout only; without it any two integers do.
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with deterministic_algorithms(self._deterministic):
            dq, dk, dv = _backward(
                dout,
                q,
                k,
                v,
                out,
                lse.contiguous(),
                None,
                None,
                num_queries,
                num_keys,
                0.0,
                band.is_causal and num_queries == num_keys,
                no_dropout,
                no_dropout,
                scale=scale,
                window_size_left=left,
                window_size_right=right,
            )
        return x.cut(dq, dk, dv)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """PyTorch's global switch on inside, as it was outside; nothing where not ``wanted``."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (before and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
