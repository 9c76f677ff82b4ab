"""Test doubles of FlashAttention 3 and 4, like those of 2 in ``double.py``.

``hopper_interface`` and ``beta_interface`` are FlashAttention 3, ``cute_interface`` is
FlashAttention 4. The signatures are those of the packages' sources, without parameters that only
other callers use.

Shapes: q, out [B, Q, H, D], k, v [B, K, G, D], lse [B, H, Q] float32.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, library

from tests.kernels.double import Four, fill, flash_forward, flash_mask, require
from tests.kernels.double_many import Sequences, fill_many, forward_many


@library.custom_op("double_flash_attn_3::forward", mutates_args=())
def _hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, lse and two accumulators of split keys."""
    require(num_splits == 1, "splits are for inference")
    assert softmax_scale is not None
    window = causal, window_size_left, window_size_right
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if cu_seqlens_q is None:
        mask = flash_mask(q.shape[1], k.shape[1], *window)
        out, lse = flash_forward(q, k, v, softmax_scale, mask, softcap)
    else:
        out, lse = forward_many(q, k, v, softmax_scale, Sequences(*lengths, *window), softcap)
    return out, lse, torch.empty(0), torch.empty(0)


@library.custom_op("double_flash_attn_3::backward", mutates_args=("dq", "dk", "dv"))
def _hopper_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    assert dq is not None
    assert dk is not None
    assert dv is not None
    assert softmax_scale is not None
    wide = max(q.shape[-1], v.shape[-1]) > 192
    require(not (deterministic and wide), "Deterministic backward not supported for hdim 256.")
    window = is_causal, window_size_left, window_size_right
    tensors = (dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale
    if cu_seqlens_q is None:
        return fill(*tensors, flash_mask(q.shape[1], k.shape[1], *window), softcap)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return fill_many(*tensors, Sequences(*lengths, *window), softcap)


def hopper_interface() -> SimpleNamespace:
    """``flash_attn_interface`` since November 2025: operators."""
    return SimpleNamespace(
        _flash_attn_forward=_hopper_forward, _flash_attn_backward=_hopper_backward
    )


def beta_interface() -> SimpleNamespace:
    """``flash_attn_interface`` before that: no defaults, and a window is a pair."""

    def _forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: None,
        v_new: None,
        qv: None,
        out: None,
        cu_seqlens_q: None,
        cu_seqlens_k: None,
        page_table: None,
        q_descale: None,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, None, None]:
        mask = flash_mask(q.shape[1], k.shape[1], causal, *window_size)
        return *flash_forward(q, k, v, softmax_scale, mask, softcap), None, None

    def _backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: None,
        cu_seqlens_k: None,
        sequed_q: None,
        sequed_k: None,
        max_seqlen_q: None,
        max_seqlen_k: None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Four:
        mask = flash_mask(q.shape[1], k.shape[1], causal, *window_size)
        delta = fill((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale, mask, softcap)
        return dq, dk, dv, delta

    return SimpleNamespace(_flash_attn_forward=_forward, _flash_attn_backward=_backward)


def cute_interface() -> SimpleNamespace:
    """``flash_attn.cute.interface`` of August 2026."""

    def _fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        num_splits: int = 1,
        return_lse: bool = False,
        out: None = None,
        lse: None = None,
    ) -> tuple[Tensor, Tensor | None, None, None]:
        assert softmax_scale is not None
        window = causal, *_none_window(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        if cu_seqlens_q is None:
            mask = flash_mask(q.shape[1], k.shape[1], *window)
            result, row_lse = flash_forward(q, k, v, softmax_scale, mask, softcap or 0.0)
        else:
            sequences = Sequences(*lengths, *window)
            result, row_lse = forward_many(q, k, v, softmax_scale, sequences, softcap or 0.0)
        return result, row_lse if return_lse else None, None, None

    def _bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        m_block_size: int = 64,
        deterministic: bool = False,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        assert softmax_scale is not None
        window = causal, *_none_window(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        tensors = grads, dout, q, k, v, out, lse, softmax_scale
        if cu_seqlens_q is None:
            fill(*tensors, flash_mask(q.shape[1], k.shape[1], *window), softcap)
        else:
            fill_many(*tensors, Sequences(*lengths, *window), softcap)
        return grads

    # The version that corrected the softcap added this function.
    utils = SimpleNamespace(create_softcap_scoremod_bwd=None)
    return SimpleNamespace(_flash_attn_fwd=_fwd, _flash_attn_bwd=_bwd, utils=utils)


def _none_window(left: int | None, right: int | None) -> tuple[int, int]:
    """Here an unlimited bound is None, and a negative one is an offset like any other."""
    require(left is None or left >= 0, "None is no bound; -1 would hide the row's own key")
    require(right is None or right >= 0, "None is no bound")
    return -1 if left is None else left, -1 if right is None else right
