"""Test doubles of the flash-attn package, generation 2: its signatures, rules and results on a CPU.

This module stands for ``flash_attn.flash_attn_interface`` of 2.8. ``pair_window_interface`` stands
for that of 2.6, where a window was a pair and forward returned eight values. Since 2.7 the
functions are PyTorch operators, which hide their signatures, as do these. ``double_newer.py`` has
the later generations.

All doubles refuse what the CUDA code refuses or would misread, and compute the definition in
float64.

Shapes: q, out [B, Q, H, D], k, v [B, K, G, D], lse [B, H, Q] float32.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, library

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class RefusedByExtension(RuntimeError):  # noqa: N818 (reads as what happened)
    """The error of the extension."""


@library.custom_op("double_flash_attn_2::forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2.8: (out, softmax_lse, S_dmask, rng_state)."""
    _check_plain(dropout_p, alibi_slopes)
    require(not return_softmax, "the debug mask exists with dropout only")
    mask = flash_mask(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    out, lse = flash_forward(q, k, v, softmax_scale, mask, softcap)
    return out, lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)


@library.custom_op("double_flash_attn_2::backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """2.8: fills dq, dk, dv and returns sum(dout * out) per row."""
    _check_plain(dropout_p, alibi_slopes)
    mask = flash_mask(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    return fill((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale, mask, softcap)


def pair_window_interface() -> SimpleNamespace:
    """2.6: ``window_size`` is a pair, and forward returns eight values; the lse is the sixth."""

    def _forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> Eight:
        out, lse, _, _ = _flash_attn_forward(
            q, k, v, dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes,
            return_softmax,
        )  # fmt: skip
        return out, q, k, v, out, lse, None, None

    def _backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Four:
        delta = _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
            *window_size, softcap, alibi_slopes, deterministic, rng_state,
        )  # fmt: skip
        return dq, dk, dv, delta

    return SimpleNamespace(_flash_attn_forward=_forward, _flash_attn_backward=_backward)


def flash_mask(rows: int, columns: int, causal: bool, left: int, right: int) -> Tensor:
    """bool [rows, columns]: how flash attention reads its arguments, one pair at a time.

    Row i attends column j iff ``i + s - left <= j <= i + s + right`` with s = columns - rows, and
    causal means right = 0. A bound that is negative or at least ``columns`` is unlimited; but next
    to a limited bound, unlimited means ``columns``. Observed on a GPU with PyTorch 2.11.
    """
    right = 0 if causal else right
    shift = columns - rows
    left, right = (-1 if bound >= columns else bound for bound in (left, right))
    if (left < 0) != (right < 0):
        left, right = (columns if bound < 0 else bound for bound in (left, right))
    return torch.tensor(
        [
            [
                (left < 0 or i + shift - left <= j) and (right < 0 or j <= i + shift + right)
                for j in range(columns)
            ]
            for i in range(rows)
        ]
    )


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """out in q's type and lse in float32, as the extensions return them."""
    _check_operands(q, k, v)
    out, lse = attend(q.double(), k.double(), v.double(), scale, mask, softcap)
    # A row without keys has an out of 0 and an lse of +inf.
    out, lse = out.nan_to_num(0.0), lse.masked_fill(lse == -torch.inf, torch.inf)
    return out.to(q.dtype), lse.float()


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The definition: out [B, Q, H, E] and lse [B, H, Q]; a softcap of 0 is none."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v), scores.logsumexp(-1)


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor,
    softcap: float = 0.0,
) -> Four:
    """dq, dk, dv and delta from the rows' out and lse, by the formula, in float64."""
    group = q.shape[2] // k.shape[2]
    dout, q, out, lse = (x.double() for x in (dout, q, out, lse))
    # [B, K, G, D] -> [B, K, H, D]
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, wide_k)
    slope = torch.ones_like(scores)
    if softcap:
        slope = torch.cosh(scores / softcap) ** -2
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~mask, 0.0)
    delta = (dout * out).sum(-1).transpose(1, 2)  # [B, H, Q]
    dscores = torch.einsum("bqhe,bkhe->bhqk", dout, wide_v) - delta.unsqueeze(-1)
    dscores = scale * weights * dscores * slope
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, wide_k)
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q)
    dv = torch.einsum("bhqk,bqhe->bkhe", weights, dout)
    # [B, K, H, D] -> [B, K, G, D]
    dk, dv = (x.unflatten(2, (k.shape[2], group)).sum(3) for x in (dk, dv))
    return dq, dk, dv, delta


def fill(
    grads: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor,
    softcap: float = 0.0,
) -> Tensor:
    """Checks the arguments, writes dq, dk, dv and returns delta."""
    _check_operands(q, k, v, dout, out, *grads)
    batch, rows, heads, _ = q.shape
    require(lse.dtype == torch.float32, "lse must be float32")
    require(lse.shape == (batch, heads, rows), "lse must be [B, H, Q]")
    require(lse.is_contiguous(), "lse is read as contiguous")
    require(not any(x.isnan().all() for x in (out, dout)), "out and dout are read")
    *found, delta = gradients(dout, q, k, v, out, lse, scale, mask, softcap)
    for grad, value in zip(grads, found, strict=True):
        grad.copy_(value)
    return delta.float()


def require(condition: Any, rule: str) -> None:
    if not condition:
        raise RefusedByExtension(rule)


def _check_plain(dropout_p: float, alibi_slopes: Tensor | None) -> None:
    plain = dropout_p == 0.0 and alibi_slopes is None
    require(plain, "these doubles have no dropout and no slopes")


def _check_operands(q: Tensor, k: Tensor, v: Tensor, *like_q_or_k: Tensor) -> None:
    """Checks type, layout and strides of q, k, v, and of (dout, out, dq, dk, dv)."""
    batch, rows, heads, dim = q.shape
    columns, groups = k.shape[1:3]
    shapes = [(batch, rows, heads, dim)] + [(batch, columns, groups, dim)] * 2
    shapes += [shapes[0]] * 3 + [shapes[1]] * 2
    for x, shape in zip((q, k, v, *like_q_or_k), shapes):
        require(x.dtype in (torch.bfloat16, torch.float16), "only fp16 and bf16")
        require(x.dtype == q.dtype, "one type")
        require(x.shape == shape, f"expected {shape}, got {tuple(x.shape)}")
        require(x.stride(-1) == 1, "the last dim must be contiguous")
    require(heads % groups == 0, "query heads must be a multiple of kv heads")
    require(dim % 8 == 0 and dim <= 256, "head dim must be a multiple of 8 up to 256")
    require(rows > 0 and columns > 0, "lengths must be positive")
