"""The reference: attention as its formula, in eager PyTorch. Quadratic memory, any float type.

Shapes as in ``interface.py``; g = query heads per key/value head.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.kernels.dropout import TileDropout
from cp_megatron.kernels.interface import BackwardInputs, accumulation_dtype, allowed
from cp_megatron.plan.tiling import Band


class ReferenceKernel:
    """Computes in float32 (float64 for float64 inputs), with or without dropout.

    With the softmax P, the mask M of kept pairs divided by 1 - p, and dropped weights D = P M:

        out = D V            dV = D^T dO          dD = dO V^T
        dS = P (M dD - delta)                     delta = sum_k P M dD = sum(dO out)

    So dropout leaves the softmax's backward as it is: delta still follows from the merged out. A
    softcap c makes the scores c tanh(s / c), and multiplies dS by 1 - tanh(s / c)^2.

    Args:
        dropout: the dropout of the one tile that this kernel computes; None drops nothing.
        softcap: the bound c of the scores; None leaves them as they are.
    """

    joins = False

    def __init__(self, dropout: TileDropout | None = None, *, softcap: float | None = None) -> None:
        self._dropout, self._softcap = dropout, softcap

    def dropping(self, dropout: TileDropout) -> ReferenceKernel:
        return ReferenceKernel(dropout, softcap=self._softcap)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, or float64 for float64."""
        return accumulation_dtype(dtype)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores, _ = self._scores(q, k, band, scale)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse.unsqueeze(-1))
        if self._dropout is not None:
            weights = weights * _kept(self._dropout, weights)
        out = torch.einsum("bngqk,bkne->bqnge", weights, v)
        return (rearrange(out, "b q n g e -> b q (n g) e"), rearrange(lse, "b n g q -> b (n g) q"))

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out, lse = x
        scores, slope = self._scores(q, k, band, scale)
        num_groups = k.shape[2]
        weights = torch.exp(scores - rearrange(lse, "b (n g) q -> b n g q 1", n=num_groups))
        dout, out, q = (
            rearrange(y, "b q (n g) e -> b q n g e", n=num_groups) for y in (dout, out, q)
        )
        dweights = torch.einsum("bqnge,bkne->bngqk", dout, v)
        dropped = weights
        if self._dropout is not None:
            kept = _kept(self._dropout, weights)
            dropped, dweights = weights * kept, dweights * kept
        dv = torch.einsum("bngqk,bqnge->bkne", dropped, dout)
        delta = rearrange((dout * out).sum(-1), "b q n g -> b n g q 1")
        dscores = weights * (dweights - delta) * scale
        if slope is not None:
            dscores *= slope
        dq = torch.einsum("bngqk,bknd->bqngd", dscores, k)
        dk = torch.einsum("bngqk,bqngd->bknd", dscores, q)
        return rearrange(dq, "b q n g d -> b q (n g) d"), dk, dv

    def _scores(
        self, q: Tensor, k: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Two tensors [B, G, g, Q, K]: the scores, -inf outside the band, and the derivative of
        the softcap, None without one."""
        grouped = rearrange(q, "b q (n g) d -> b q n g d", n=k.shape[2])
        scores = torch.einsum("bqngd,bknd->bngqk", grouped, k) * scale
        slope = None
        if self._softcap is not None:
            bounded = torch.tanh(scores / self._softcap)
            scores, slope = bounded * self._softcap, 1 - bounded.square()
        if band.is_full:
            return scores, slope
        mask = allowed(band, q.shape[1], k.shape[1], q.device)
        return scores.masked_fill(~mask, -torch.inf), slope


def _kept(dropout: TileDropout, weights: Tensor) -> Tensor:
    """[B, G, g, Q, K]: 0 for dropped pairs, 1 / (1 - p) for the others."""
    num_batch, num_groups, group_size = weights.shape[:3]
    kept = dropout.weights(num_batch, num_groups * group_size, weights.dtype)
    return rearrange(kept, "b (n g) q k -> b n g q k", n=num_groups)
