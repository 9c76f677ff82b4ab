"""cuDNN's fused attention, through PyTorch's op. It has no windows, only full and causal tiles.

Shapes as in ``interface.py``; the op takes [B, heads, length, dim] views and keeps the lse as
[B, H, Q, 1]. Key and value head dims may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cp_megatron.errors import ConfigError
from cp_megatron.kernels.interface import BackwardInputs, cut, same_width
from cp_megatron.kernels.reference import ReferenceKernel
from cp_megatron.plan.tiling import Band

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


class CudnnKernel:
    """Suits rows whose tiles have few shapes, because cuDNN builds and keeps a plan for each shape.

    The cache of plans knows the strides of q, k and v only. A cached plan would misread out, dout
    or lse in another layout, so they are always passed in the same layout.

    The op refuses a single key. Such tiles (a document of one token, for example) are computed by
    ``reference`` in float32; they are only a product of vectors.
    """

    joins = False

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of the inputs; the op accumulates in float32 inside."""
        return dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel.forward``; out has the inputs' type.

        Raises:
            ConfigError: PyTorch's switch for shared plans is on.
        """
        _check_band(band, q, k)
        if k.shape[1] == 1:
            out, lse = ReferenceKernel().forward(q.float(), k.float(), v.float(), band, scale)
            return out.to(q.dtype), lse
        num_heads, v_dim = q.shape[2], v.shape[-1]
        q, k, v = _operands(q, k, v)
        out, lse, *_ = _forward(q, k, v, None, True, 0.0, band.is_causal, False, scale=scale)
        # [B, H, Q, 1] -> [B, H, Q]
        lse = lse.squeeze(-1)
        if lse.stride(1) == 1 and num_heads > 1 and lse.shape[2] > 1:
            rule = "makes cuDNN keep the lse in a layout that cannot be merged"
            works = "unset it, or --kernel cuda"
            raise ConfigError("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1", rule, works)
        return cut(out.transpose(1, 2), v_dim), lse

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check_band(band, x.q, x.k)
        num_queries, num_keys = x.q.shape[1], x.k.shape[1]
        if num_keys == 1:
            wide = BackwardInputs(*(y.float() for y in x))
            dq, dk, dv = ReferenceKernel().backward(wide, band, scale)
            return dq.to(x.q.dtype), dk.to(x.q.dtype), dv.to(x.q.dtype)
        q, k, v = _operands(x.q, x.k, x.v)
        padded = same_width(x.dout, x.out, multiple=8)
        dout, out = (y.contiguous().transpose(1, 2) for y in padded)
        # The op reads the seed for dropout only; without it any integer does.
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        lse = x.lse.contiguous().unsqueeze(-1)  # [B, H, Q] -> [B, H, Q, 1]
        dq, dk, dv = _backward(
            *(dout, q, k, v, out, lse, no_dropout, no_dropout, None, None, None),
            *(num_queries, num_keys, 0.0, band.is_causal),
            scale=scale,
        )
        return x.cut(dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2))


def _operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [B, heads, length, dim] views, with widths rounded up to multiples of 8."""
    q, k = same_width(q, k, multiple=8)
    (v,) = same_width(v, multiple=8)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _check_band(band: Band, q: Tensor, k: Tensor) -> None:
    causal_square = band.is_causal and q.shape[1] == k.shape[1]
    assert band.is_full or causal_square, "cuDNN has no sliding windows"
