"""PyTorch's fused CUDA flash attention: FlashAttention 2, or 3 or 4 if activated in PyTorch.

``torch.nn.attention.activate_flash_attention_impl("FA3")`` (or "FA4") puts those kernels behind the
same ops, and ``cuda`` then runs them.

Shapes as in ``interface.py``; the op takes them as they are, [B, length, heads, dim].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cp_megatron.kernels.interface import BackwardInputs
from cp_megatron.kernels.segments import Lengths
from cp_megatron.kernels.windows import FlashKernel, FlashWindow

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


class CudaKernel(FlashKernel):
    """Calls the low-level op: ``_scaled_dot_product_flash_attention`` has no windows.

    Args:
        deterministic: sum dQ in a fixed order. The op has no argument for it and reads PyTorch's
            global switch, so the switch is on during the call and is restored after it.
    """

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic

    def call_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: FlashWindow,
        scale: float,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _forward(
            *(q, k, v, *_sizes(q, k, lengths), 0.0, window.causal, False),
            scale=scale,
            window_size_left=window.left,
            window_size_right=window.right,
        )
        return out, lse

    def call_backward(
        self, x: BackwardInputs, window: FlashWindow, scale: float, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The op reads the random state for dropout only; without it any two integers do.
        no_dropout = torch.empty(2, dtype=torch.uint64, device=x.q.device)
        with deterministic_algorithms(self._deterministic):
            dq, dk, dv = _backward(
                *(*x, *_sizes(x.q, x.k, lengths), 0.0, window.causal, no_dropout, no_dropout),
                scale=scale,
                window_size_left=window.left,
                window_size_right=window.right,
            )
        return dq, dk, dv


def _sizes(
    q: Tensor, k: Tensor, lengths: Lengths | None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The arguments cum_seq_q, cum_seq_k, max_q and max_k of the ops."""
    if lengths is None:
        return None, None, q.shape[1], k.shape[1]
    return lengths


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Turns PyTorch's global switch on inside, if ``wanted``, and restores it afterwards."""
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
