"""Doubles of the flash-attn package's interface: its signatures, its rules, its results, on a CPU.

This module stands for ``flash_attn.flash_attn_interface`` of 2.8; ``pair_window_interface`` makes
the one of 2.6, where a window was a pair and forward returned eight values. Both refuse what the
CUDA extension refuses or would read wrongly, and compute the definition in float64.

Shapes: q, out [B, Q, H, D], k, v [B, K, G, D], lse [B, H, Q] float32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cp_megatron.kernels.flash_attn import FlashAttnKernel

ADAPTER = "cp_megatron.kernels.flash_attn"
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class RefusedByExtension(RuntimeError):  # noqa: N818 (reads as what happened)
    """What the extension answers with."""


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
    _check_plain(dropout_p, softcap, alibi_slopes)
    _require(not return_softmax, "the debug mask exists with dropout only")
    _check_operands(q, k, v)
    mask = flash_mask(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    out, lse = _attend(q.double(), k.double(), v.double(), softmax_scale, mask)
    # A row without keys comes out as 0 with an lse of +inf.
    out, lse = out.nan_to_num(0.0), lse.masked_fill(lse == -torch.inf, torch.inf)
    return out.to(q.dtype), lse.float(), torch.empty(0), torch.zeros(2, dtype=torch.int64)


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
    _check_plain(dropout_p, softcap, alibi_slopes)
    _check_operands(q, k, v, dout, out, dq, dk, dv)
    batch, rows, heads, _ = q.shape
    _require(softmax_lse.dtype == torch.float32, "lse must be float32")
    _require(softmax_lse.shape == (batch, heads, rows), "lse must be [B, H, Q]")
    _require(softmax_lse.is_contiguous(), "lse is read as contiguous")
    _require(not any(x.isnan().all() for x in (out, dout)), "out and dout are read")
    mask = flash_mask(rows, k.shape[1], causal, window_size_left, window_size_right)
    group = heads // k.shape[2]
    # [B, K, G, D] -> [B, K, H, D]
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = softmax_scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), wide_k)
    weights = torch.exp(scores - softmax_lse.double().unsqueeze(-1)).masked_fill(~mask, 0.0)
    delta = (dout.double() * out.double()).sum(-1).transpose(1, 2)  # [B, H, Q]
    dscores = torch.einsum("bqhd,bkhd->bhqk", dout.double(), wide_v) - delta.unsqueeze(-1)
    dscores = softmax_scale * weights * dscores
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", dscores, wide_k))
    for grad, per_head in (
        (dk, torch.einsum("bhqk,bqhd->bkhd", dscores, q.double())),
        (dv, torch.einsum("bhqk,bqhd->bkhd", weights, dout.double())),
    ):
        # [B, K, H, D] -> [B, K, G, D]
        grad.copy_(per_head.unflatten(2, (k.shape[2], group)).sum(3))
    return delta.float()


def pair_window_interface() -> SimpleNamespace:
    """2.6: ``window_size`` is a pair, and forward returns eight values with the lse sixth."""

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        delta = _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
            *window_size, softcap, alibi_slopes, deterministic, rng_state,
        )  # fmt: skip
        return dq, dk, dv, delta

    return SimpleNamespace(_flash_attn_forward=_forward, _flash_attn_backward=_backward)


def flash_mask(rows: int, columns: int, causal: bool, left: int, right: int) -> Tensor:
    """bool [rows, columns]: flash attention's meaning of its arguments, one pair at a time.

    Row i sees column j iff ``i + s - left <= j <= i + s + right`` with s = columns - rows, a
    negative bound is none, and causal is right = 0.
    """
    right = 0 if causal else right
    shift = columns - rows
    return torch.tensor(
        [
            [
                (left < 0 or i + shift - left <= j) and (right < 0 or j <= i + shift + right)
                for j in range(columns)
            ]
            for i in range(rows)
        ]
    )


@contextmanager
def installed() -> Iterator[type[FlashAttnKernel]]:
    """The adapter, imported as if the package were there; nothing of it stays afterwards."""
    package, interface = ModuleType("flash_attn"), sys.modules[__name__]
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.__dict__["flash_attn_interface"] = interface
    saved = {name: sys.modules.pop(name, None) for name in ("flash_attn", ADAPTER)}
    sys.modules["flash_attn"] = package
    try:
        from cp_megatron.kernels.flash_attn import FlashAttnKernel

        yield FlashAttnKernel
    finally:
        for name, module in saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise RefusedByExtension(rule)


def _check_plain(dropout_p: float, softcap: float, alibi_slopes: Tensor | None) -> None:
    plain = dropout_p == 0.0 and softcap == 0.0 and alibi_slopes is None
    _require(plain, "these doubles know no dropout, cap or slopes")


def _check_operands(q: Tensor, k: Tensor, v: Tensor, *like_q_or_k: Tensor) -> None:
    """Type, layout and strides of q, k, v, and of (dout, out, dq, dk, dv)."""
    batch, rows, heads, dim = q.shape
    columns, groups = k.shape[1:3]
    shapes = [(batch, rows, heads, dim)] + [(batch, columns, groups, dim)] * 2
    shapes += [shapes[0]] * 3 + [shapes[1]] * 2
    for x, shape in zip((q, k, v, *like_q_or_k), shapes):
        _require(x.dtype in (torch.bfloat16, torch.float16), "only fp16 and bf16")
        _require(x.dtype == q.dtype, "one type")
        _require(x.shape == shape, f"expected {shape}, got {tuple(x.shape)}")
        _require(x.stride(-1) == 1, "the last dim must be contiguous")
    _require(heads % groups == 0, "query heads must be a multiple of kv heads")
    _require(dim % 8 == 0 and dim <= 256, "head dim must be a multiple of 8 up to 256")
    _require(rows > 0 and columns > 0, "lengths must be positive")
