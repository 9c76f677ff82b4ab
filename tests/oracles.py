"""Slow and simple versions of the engine's results, which share no code with the engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cp_megatron.plan import Mask


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None = None,
    *,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v of q [B, S, H, D], k [B, S, G, D], v [B, S, G, E]."""
    return dense_results(q, k, v, mask, scale, sinks=sinks, softcap=softcap)[0]


def dense_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None = None,
    *,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, E] and lse [B, H, S].

    A sink, [H], is one more column of scores, without a value: its weight is dropped.
    """
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.from_numpy(mask.dense())
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]]
    return torch.einsum("bhqk,bkhe->bqhe", weights, v), torch.logsumexp(scores, dim=-1)


def attention_inputs(
    seed: int, batch: int, seq_len: int, heads: int, kv_heads: int, dim: int, v_dim: int
) -> list[Tensor]:
    """float64 q, k, v and dout of the whole row, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, v_dim), (heads, v_dim)]
    return [
        torch.randn(batch, seq_len, *shape, generator=generator, dtype=torch.float64)
        for shape in shapes
    ]


def dense_gradients(inputs: list[Tensor], mask: Mask) -> dict[str, Tensor]:
    """out, dq, dk and dv of dense attention in float64."""
    *qkv, dout = inputs
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = dense_attention(q, k, v, mask)
    out.backward(dout)
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def relative_error(x: Tensor, whole: Tensor, positions: Tensor, terms: int = 1) -> float:
    """The error of one rank's part: ||x - ref|| / max(||ref on this rank||, ||ref|| / sqrt(cp)).

    A reference that is zero except for rounding (dq and dk if every query has one key) is replaced
    by the size of the inputs, which are drawn from a normal distribution. Each element sums
    ``terms`` of them, one per query head of a key/value head. A NaN counts as infinite, because
    ``max`` of several errors may pass over it.
    """
    part = whole.index_select(1, positions)
    share = float(np.sqrt(whole.shape[1] / positions.numel()))
    floor = max(float(part.norm()), float(whole.norm()) / share)
    unit = float(np.sqrt(part.numel() * terms))
    if floor < 1e-9 * unit:
        floor = unit
    return _distance(x, part) / floor


def relative_gap(x: Tensor, expected: Tensor) -> float:
    """||x - expected|| / ||expected|| of whole tensors; a NaN counts as infinite."""
    return _distance(x, expected) / float(expected.norm())


def _distance(x: Tensor, expected: Tensor) -> float:
    return float((x.to(torch.float64) - expected).norm().nan_to_num(nan=torch.inf))
