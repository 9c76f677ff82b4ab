"""PyTorch's fused CPU flash attention.

Shapes as in ``interface.py``; the op itself wants [B, heads, length, dim] views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype, allowed, cut, same_width
from cp_megatron.kernels.merge import merge_
from cp_megatron.plan.tiles import FULL, Band

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Shorter causal tiles are left to the op.
CAUSAL_LEAF = 128


class CpuKernel:
    """Tiles of bfloat16 are computed in float32.

    Partial results then stay float32 until the merge, which makes the sum over tiles more exact
    than one bfloat16 kernel over the whole sequence, and the op's bfloat16 backward is several
    times slower on processors without bfloat16 matrix units.

    The op computes whole blocks of 512 keys and masks what is too late: half of the work of a
    causal tile of 512 is thrown away. So a causal tile is halved until little is masked:

        causal(n)  =  | causal(n/2)              |
                      | full(n/2)    causal(n/2) |
    """

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, or float64 for float64."""
        return accumulation_dtype(dtype)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel.forward``."""
        middle = _middle(q, k, band)
        if middle is None:
            return _forward_tile(q, k, v, band, scale)
        early, late = slice(0, middle), slice(middle, None)
        above = self.forward(q[:, early], k[:, early], v[:, early], band, scale)
        out, lse = _forward_tile(q[:, late], k[:, early], v[:, early], FULL, scale)
        merge_(out, lse, *self.forward(q[:, late], k[:, late], v[:, late], band, scale))
        return torch.cat([above[0], out], dim=1), torch.cat([above[1], lse], dim=2)

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
        middle = _middle(q, k, band)
        if middle is None:
            return _backward_tile(dout, q, k, v, out, lse, band, scale)
        early, late = slice(0, middle), slice(middle, None)

        def part(
            rows: slice, columns: slice
        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
            return (
                dout[:, rows],
                q[:, rows],
                k[:, columns],
                v[:, columns],
                out[:, rows],
                lse[:, :, rows],
            )

        dq, dk, dv = self.backward(*part(early, early), band, scale)
        late_dq, late_dk, late_dv = self.backward(*part(late, late), band, scale)
        full_dq, full_dk, full_dv = _backward_tile(*part(late, early), FULL, scale)
        return (
            torch.cat([dq, late_dq + full_dq], dim=1),
            torch.cat([dk + full_dk, late_dk], dim=1),
            torch.cat([dv + full_dv, late_dv], dim=1),
        )


def _middle(q: Tensor, k: Tensor, band: Band) -> int | None:
    """Where to cut a causal square; None where the op takes the tile as it is."""
    length = q.shape[1]
    return length // 2 if band.is_causal and length == k.shape[1] > CAUSAL_LEAF else None


def _forward_tile(
    q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
) -> tuple[Tensor, Tensor]:
    v_dim = v.shape[-1]
    q, k, v = same_width(*(x.transpose(1, 2) for x in (q, k, v)))
    out, lse = _forward(q, k, v, 0.0, band.is_causal, attn_mask=_bias(band, q, k), scale=scale)
    return cut(out.transpose(1, 2), v_dim), lse


def _backward_tile(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    band: Band,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dim, v_dim = q.shape[-1], v.shape[-1]
    q, k, v, dout, out = same_width(*(x.transpose(1, 2) for x in (q, k, v, dout, out)))
    dq, dk, dv = _backward(
        dout, q, k, v, out, lse, 0.0, band.is_causal, attn_mask=_bias(band, q, k), scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return cut(dq, dim), cut(dk, dim), cut(dv, v_dim)


def _bias(band: Band, q: Tensor, k: Tensor) -> Tensor | None:
    """An additive mask for tiles the op's causal flag does not cover, in the op's own type."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if band.is_full or band.is_causal:
        return None
    mask = allowed(band, num_queries, num_keys, q.device)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
