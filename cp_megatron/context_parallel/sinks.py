"""Attention sinks: one more score per head that takes part in the softmax and has no value.

Shapes: B = batch, S = tokens, H = query heads, E = value head dim. Sums and the lse are float32
(float64 for float64), whatever the type of the sinks.

With lse and out of the keys alone, and the sink s of the row's head,

    lse' = log(exp(lse) + exp(s))        out' = exp(lse - lse') out = sigmoid(lse - s) out

A sink is added once, after all tiles are merged. The tiles' backward reads lse' and out', whose
formulas are those of a row with one more key. Only the sink's own gradient is left: its weight is
p = exp(s - lse'), and

    ds = sum over rows and batch of p (dlse' - sum(dout out'))

A sink of -inf is no sink. Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card",
arXiv:2508.10925.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Adds sinks [H] to the merged out [B, S, H, E] and lse [B, H, S], in place."""
    column = sinks.to(lse.dtype)[:, None]
    # The sigmoid, unlike 1 minus the sink's weight, keeps small factors exact.
    weight = torch.sigmoid(lse - column)
    out *= weight.transpose(1, 2).unsqueeze(-1)
    torch.logaddexp(lse, column, out=lse)


def sink_gradient(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor
) -> Tensor:
    """Returns the gradient [H] of the sinks, in the type of the lse.

    Args:
        dout: [B, S, H, E].
        dlse: [B, H, S]; None is zero.
        out, lse: with the sinks, as ``add_sinks_`` leaves them.
        sinks: [H].
    """
    exact = lse.dtype
    inner = (dout.to(exact) * out.to(exact)).sum(-1).transpose(1, 2)  # [B, H, S]
    rows = -inner if dlse is None else dlse - inner
    weight = torch.exp(sinks.to(exact)[:, None] - lse)
    return (weight * rows).sum((0, 2))
