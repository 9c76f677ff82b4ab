"""Tiles of every kind, and attention with gradients by autograd in float64.

Shapes as in the package's ``kernels/interface.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cp_megatron.kernels.interface import BackwardInputs, Kernel
from cp_megatron.plan.tiling import CAUSAL, FULL, Band

# band, rows, columns; every row has a key, and every column has a query
TILES = {
    "full": (FULL, 6, 6),
    "full wide": (FULL, 3, 7),
    "full tall": (FULL, 7, 3),
    "one row": (FULL, 1, 5),
    "one column": (FULL, 5, 1),
    "causal": (CAUSAL, 6, 6),
    "one pair": (CAUSAL, 1, 1),
    "sliding window": (Band(left=2, right=0), 6, 6),
    "both sides": (Band(left=1, right=2), 5, 7),
    "left only": (Band(left=3), 6, 4),
    "left only wide": (Band(left=1), 4, 9),
    "right only": (Band(right=2), 4, 6),
    "right only tall": (Band(right=1), 6, 4),
    "causal tall": (CAUSAL, 4, 3),
}
# query heads, key/value heads, head dim, value head dim
HEADS = [(4, 4, 8, 8), (6, 2, 8, 8), (4, 1, 16, 16), (4, 2, 8, 16), (4, 2, 16, 8)]
SCALE = 0.37


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Inputs, results and gradients of one attention; results are computed in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def allowed(band: Band, rows: int, columns: int) -> Tensor:
    """bool [rows, columns], computed one pair at a time."""
    left = rows if band.left is None else band.left
    right = columns if band.right is None else band.right
    return torch.tensor([[i - left <= j <= i + right for j in range(columns)] for i in range(rows)])


def oracle(
    mask: Tensor,
    heads: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = SCALE,
    softcap: float | None = None,
) -> Attention:
    """Attention under ``mask`` (bool [Q, K]) of random inputs that ``dtype`` represents exactly."""
    num_heads, num_groups, dim, v_dim = heads
    rows, columns = mask.shape
    generator = torch.Generator().manual_seed(rows + 10 * columns)
    shapes = [
        (rows, num_heads, dim),
        (columns, num_groups, dim),
        (columns, num_groups, v_dim),
        (rows, num_heads, v_dim),
    ]
    q, k, v, dout = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype).double()
        for shape in shapes
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    kv_head = torch.arange(num_heads) // (num_heads // num_groups)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, kv_head])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(dim=-1), v[:, :, kv_head])
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    return Attention(
        q=q.detach(),
        k=k.detach(),
        v=v.detach(),
        dout=dout,
        out=out.detach(),
        lse=scores.logsumexp(dim=-1).detach(),
        dq=dq,
        dk=dk,
        dv=dv,
    )


def error(x: Tensor, reference: Tensor) -> float:
    """||x - ref|| / max(||ref||, 1) for inputs of size 1, because some gradients are zero."""
    assert x.shape == reference.shape
    assert x.isfinite().all()
    return float((x.double() - reference).norm() / reference.norm().clamp_min(1.0))


def worst_error(
    kernel: Kernel, band: Band, a: Attention, dtype: torch.dtype, *, scale: float = SCALE
) -> float:
    """The largest error of out, lse and gradients, with operands in ``dtype``."""
    q, k, v, dout = (x.to(dtype) for x in (a.q, a.k, a.v, a.dout))
    out, lse = kernel.forward(q, k, v, band, scale)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = kernel.backward(BackwardInputs(dout, q, k, v, out, lse), band, scale)
    found = (out, lse, *grads)
    return max(error(x, y) for x, y in zip(found, (a.out, a.lse, a.dq, a.dk, a.dv), strict=True))
