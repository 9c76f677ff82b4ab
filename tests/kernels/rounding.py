"""A kernel that rounds like FlashAttention, to measure the error of its partial results.

Scores, softmax and sums are float32. Operands of matrix products are bfloat16, so the weights P and
their gradient dS are rounded, and so are all results, as in flash attention's CUDA kernels (Dao
2023, arXiv:2307.08691, algorithms 1 and 2).

Shapes as in the package's ``kernels/interface.py``; g = query heads per key/value head.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.kernels.interface import BackwardInputs, allowed
from cp_megatron.plan.tiling import Band


class RoundingKernel:
    """bfloat16 in, bfloat16 out."""

    joins = False

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = _scores(q, k, band, scale)
        lse = scores.logsumexp(-1)
        top = scores.amax(-1, keepdim=True)
        # The row is divided at the end, so exp(score - max) is what is rounded.
        weights = _rounded(torch.exp(scores - top))
        out = torch.einsum("bngqk,bkne->bngqe", weights, v.float())
        out = out / torch.exp(lse.unsqueeze(-1) - top)
        return (
            rearrange(out, "b n g q e -> b q (n g) e").bfloat16(),
            rearrange(lse, "b n g q -> b (n g) q"),
        )

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = x.k.shape[2]
        lse = rearrange(x.lse, "b (n g) q -> b n g q 1", n=groups)
        weights = torch.exp(_scores(x.q, x.k, band, scale) - lse)
        dout, out, q = (
            rearrange(y.float(), "b q (n g) e -> b n g q e", n=groups) for y in (x.dout, x.out, x.q)
        )
        k, v = x.k.float(), x.v.float()
        dv = torch.einsum("bngqk,bngqe->bkne", _rounded(weights), dout)
        dweights = torch.einsum("bngqe,bkne->bngqk", dout, v)
        dscores = _rounded(weights * (dweights - (dout * out).sum(-1, keepdim=True)))
        dq = scale * torch.einsum("bngqk,bknd->bngqd", dscores, k)
        dk = scale * torch.einsum("bngqk,bngqd->bknd", dscores, q)
        return rearrange(dq, "b n g q d -> b q (n g) d").bfloat16(), dk.bfloat16(), dv.bfloat16()


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _scores(q: Tensor, k: Tensor, band: Band, scale: float) -> Tensor:
    """[B, G, g, Q, K] float32, -inf outside the band."""
    grouped = rearrange(q.float(), "b q (n g) d -> b q n g d", n=k.shape[2])
    scores = scale * torch.einsum("bqngd,bknd->bngqk", grouped, k.float())
    mask = allowed(band, q.shape[1], k.shape[1], q.device)
    return scores.masked_fill(~mask, -torch.inf)
