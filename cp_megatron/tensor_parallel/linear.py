"""Linear layers whose weight is split over the tp ranks (Shoeybi et al. 2019, arXiv:1909.08053).

A column parallel layer's input has passed ``TensorParallel.enter``, once for all layers that share
it (q, k, v; gate, up). A row parallel layer sums its output itself.

Shapes: b batch, s sequence of one context parallel rank, i in features, o out features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.tensor_parallel.parameters import (
    Init,
    ParameterSpec,
    SpecifiedModule,
    TensorParallel,
)


class ColumnParallelLinear(SpecifiedModule):
    """Output features are split: [b, s, i] on every rank -> [b, s, o/tp]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.specs = {
            "weight": ParameterSpec(placement=Shard(0), init="normal"),
            "bias": ParameterSpec(placement=Shard(0), init="zeros"),
        }

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, i] -> [b, s, o/tp]."""
        bias = None if self.bias is None else self.local("bias")
        return F.linear(x, self.local("weight"), bias)


class ReplicatedColumnLinear(SpecifiedModule):
    """Every rank holds all output features and computes only its ``rows`` of them.

    For key/value heads that several tp ranks share: [b, s, i] -> [b, s, len(rows)]. Each rank's
    gradient is zero outside its rows and a summand inside them.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, rows: slice) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.specs = {
            "weight": ParameterSpec(placement=Replicate(), init="normal", partial=True),
            "bias": ParameterSpec(placement=Replicate(), init="zeros", partial=True),
        }

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, i] -> [b, s, len(rows)]."""
        bias = None if self.bias is None else self.local("bias")[self.rows]
        return F.linear(x, self.local("weight")[self.rows], bias)


class RowParallelLinear(SpecifiedModule):
    """Input features are split: [b, s, i/tp] -> the ranks' sum, as a residual stream."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp: TensorParallel,
        init: Init = "scaled_normal",
    ) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.specs = {
            "weight": ParameterSpec(placement=Shard(1), init=init),
            "bias": ParameterSpec(placement=Replicate(), init="zeros", partial=tp.splits_sequence),
        }

    def forward(self, x: Tensor, *, forgotten: bool = False) -> Tensor:
        """[b, s, i/tp] -> [b, s, o], with sequence parallelism [b, s/tp, o].

        Args:
            x: the input.
            forgotten: nobody reads the values of the result, only gradients will come through it:
                nothing is computed and no message is sent.
        """
        if forgotten:
            out = _forgotten_product(x, self.local("weight"), self.tp)
        else:
            out = self.tp.leave(F.linear(x, self.local("weight")))
        # After the sum, or every rank would add it.
        return out if self.bias is None else out + self.local("bias")


def _forgotten_product(x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """``tp.leave(x @ weight.T)`` of which only the gradient is right."""
    result: Tensor = _ForgottenProduct.apply(x, weight, tp)
    return result


class _ForgottenProduct(torch.autograd.Function):
    """Forward: memory as it comes. Backward: that of the product and of ``TensorParallel.leave``,
    which with sequence parallelism gathers the ranks' rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp = tp
        rows = x.shape[1] // (tp.size if tp.splits_sequence else 1)
        return x.new_empty((x.shape[0], rows, weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        dout = all_gather_dim(grads[0], 1, tp.group) if tp.splits_sequence else grads[0]
        # [b, s, o] and [b, s, i/tp] -> [o, i/tp]
        return dout @ weight, dout.flatten(0, 1).T @ x.flatten(0, 1), None
