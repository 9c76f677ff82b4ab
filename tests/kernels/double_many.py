"""Test doubles of flash attention's functions for sequences of several lengths, on a CPU.

Shapes: T, U = rows and columns of all sequences, q, out [T, H, D], k, v [U, G, D], lse [H, T], and
edges int32 [sequences + 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.kernels import double
from tests.kernels.double import attend, fill, flash_forward, gradients, require


class Sequences(NamedTuple):
    """The arguments that describe the sequences and the mask, as the extensions take them."""

    q_edges: Tensor
    k_edges: Tensor
    max_q: int
    max_k: int
    causal: bool
    left: int
    right: int

    def parts(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and mask of each sequence, after the checks of the extensions."""
        for edges, x in ((self.q_edges, q), (self.k_edges, k)):
            require(x.dim() == 3, "sequences of several lengths have no batch dim")
            require(edges.dtype == torch.int32 and edges.is_contiguous(), "edges are int32")
            require(edges[0] == 0 and edges[-1] == x.shape[0], "the sequences are the tensor")
        require(len(self.q_edges) == len(self.k_edges), "as many sequences of keys as of queries")
        require(self.max_q > 1, "heads would take the place of rows, and lse another layout")
        q_spans, k_spans = (list(pairwise(x.tolist())) for x in self[:2])
        require(max(b - a for a, b in q_spans) <= self.max_q, "rows beyond max_q are not computed")
        require(max(b - a for a, b in k_spans) <= self.max_k, "columns beyond max_k are not read")
        for rows, columns in zip(q_spans, k_spans):
            mask = self.mask(rows[1] - rows[0], columns[1] - columns[0])
            yield slice(*rows), slice(*columns), mask

    def mask(self, rows: int, columns: int) -> Tensor:
        """bool [rows, columns]. Bounds are compared with the longest sequence, not with each."""
        shift, right = columns - rows, 0 if self.causal else self.right
        left, right = (-1 if bound >= self.max_k else bound for bound in (self.left, right))
        if (left < 0) != (right < 0):
            left, right = (self.max_k if bound < 0 else bound for bound in (left, right))
        i, j = torch.arange(rows)[:, None] + shift, torch.arange(columns)[None]
        mask = torch.ones(rows, columns, dtype=torch.bool)
        return mask if left < 0 else mask & (j >= i - left) & (j <= i + right)


def forward_many(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """out in q's type and lse in float32, as the extensions return them."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for rows, columns, mask in sequences.parts(q, k):
        part = q[None, rows], k[None, columns], v[None, columns]
        out[None, rows], lse[None, :, rows] = flash_forward(*part, scale, mask, softcap)
    return out, lse


def fill_many(
    grads: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    sequences: Sequences,
    softcap: float = 0.0,
) -> Tensor:
    """Checks the arguments, writes dq, dk, dv and returns delta."""
    require(lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0]), "lse must be [H, T]")
    delta = torch.empty_like(lse)
    dq, dk, dv = grads
    for rows, columns, mask in sequences.parts(q, k):
        part = dq[None, rows], dk[None, columns], dv[None, columns]
        tensors = q[None, rows], k[None, columns], v[None, columns], out[None, rows]
        row_lse = lse[None, :, rows].contiguous()
        delta[None, :, rows] = fill(part, dout[None, rows], *tensors, row_lse, scale, mask, softcap)
    return delta


def generation_two() -> SimpleNamespace:
    """``flash_attn.flash_attn_interface`` of 2.8, with the functions for several lengths."""

    def _varlen_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        return_softmax: bool = False,
        block_table: None = None,
        zero_tensors: bool = False,
    ) -> tuple[Tensor, Tensor, None, None]:
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        sequences = Sequences(*lengths, causal, window_size_left, window_size_right)
        return *forward_many(q, k, v, softmax_scale, sequences, softcap), None, None

    def _varlen_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: None,
        deterministic: bool,
        rng_state: None = None,
        zero_tensors: bool = False,
    ) -> Tensor:
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        sequences = Sequences(*lengths, causal, window_size_left, window_size_right)
        tensors = (dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale
        return fill_many(*tensors, sequences, softcap)

    return SimpleNamespace(
        _flash_attn_forward=double._flash_attn_forward,
        _flash_attn_backward=double._flash_attn_backward,
        _flash_attn_varlen_forward=_varlen_forward,
        _flash_attn_varlen_backward=_varlen_backward,
    )


def aten_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Any, ...]:
    """``aten._flash_attention_forward`` that keeps float64, for exact comparisons."""
    q, k, v, sequences = _sequences(
        (q, k, v),
        cum_seq_q,
        cum_seq_k,
        (max_q, max_k, is_causal, window_size_left, window_size_right),
    )
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for rows, columns, mask in sequences.parts(q, k):
        part = q[None, rows], k[None, columns], v[None, columns]
        out[None, rows], lse[None, :, rows] = attend(*part, scale, mask)
    if cum_seq_q is None:
        batch = len(sequences.q_edges) - 1
        # [B * Q, H, D] -> [B, Q, H, D] and [H, B * Q] -> [B, H, Q]
        out, lse = out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)
    return out, lse.contiguous(), None, None, None


def aten_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten._flash_attention_backward`` likewise."""
    shapes = [x.shape for x in (q, k, v)]
    q, k, v, dout, out, sequences = _sequences(
        (q, k, v, dout, out),
        *(cum_seq_q, cum_seq_k),
        (max_q, max_k, is_causal, window_size_left, window_size_right),
    )
    require(lse.is_contiguous(), "lse is read as contiguous")
    if cum_seq_q is None:
        lse = lse.transpose(0, 1).flatten(1)  # [B, H, Q] -> [H, B * Q]
    require(lse.shape == (q.shape[1], q.shape[0]), "lse must be [H, T]")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for rows, columns, mask in sequences.parts(q, k):
        found = gradients(
            *(x[None] for x in (dout[rows], q[rows], k[columns], v[columns], out[rows])),
            *(lse[None, :, rows], scale, mask),
        )
        dq[None, rows], dk[None, columns], dv[None, columns], _ = found
    return dq.view(shapes[0]), dk.view(shapes[1]), dv.view(shapes[2])


def _sequences(
    tensors: tuple[Tensor, ...],
    q_edges: Tensor | None,
    k_edges: Tensor | None,
    rest: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The tensors without a batch dim, each row of the batch a sequence, and the sequences."""
    q, k, *_ = tensors
    if q_edges is None or k_edges is None:
        q_edges, k_edges = (
            torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], dtype=torch.int32)
            for x in (q, k)
        )
        rest = (max(rest[0], 2), *rest[1:])  # one row has the layout of several here
        tensors = tuple(x.flatten(0, 1) for x in tensors)
    return *tensors, Sequences(q_edges, k_edges, *rest)
