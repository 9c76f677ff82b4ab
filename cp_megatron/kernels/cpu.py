"""PyTorch's fused CPU flash attention.

Shapes as in ``interface.py``; the op itself wants [B, heads, length, dim] views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype, allowed, same_width
from cp_megatron.plan.tiles import Band

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuKernel:
    """Tiles of bfloat16 are computed in float32.

    Partial results then stay float32 until the merge, which makes the sum over tiles more exact
    than one bfloat16 kernel over the whole sequence, and the op's bfloat16 backward is several
    times slower on processors without bfloat16 matrix units.
    """

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, or float64 for float64."""
        return accumulation_dtype(dtype)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel.forward``."""
        v_dim = v.shape[-1]
        q, k, v = same_width(*(x.transpose(1, 2) for x in (q, k, v)))
        out, lse = _forward(q, k, v, 0.0, band.is_causal, attn_mask=_bias(band, q, k), scale=scale)
        return out.transpose(1, 2)[..., :v_dim], lse

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
        q, k, v, dout, out = same_width(*(x.transpose(1, 2) for x in (q, k, v, dout, out)))
        dq, dk, dv = _backward(
            dout, q, k, v, out, lse, 0.0, band.is_causal, attn_mask=_bias(band, q, k), scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
        return dq[..., :dim], dk[..., :dim], dv[..., :v_dim]


def _bias(band: Band, q: Tensor, k: Tensor) -> Tensor | None:
    """An additive mask for tiles the op's causal flag does not cover, in the op's own type."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if band.is_full or band.is_causal:
        return None
    mask = allowed(band, num_queries, num_keys, q.device)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
