"""Linear layers whose weight is split over the tp ranks (Shoeybi et al. 2019, arXiv:1909.08053).

A column parallel layer's input has passed ``TensorParallel.enter``, once for all layers that share
it (q, k, v; gate, up). A row parallel layer sums its output itself.

Shapes: b batch, s sequence of one context parallel rank, i in features, o out features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from cp_megatron.tensor_parallel.parameters import (
    Init,
    ParameterSpec,
    SpecifiedModule,
    TensorParallel,
    local_weight,
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
        bias = None if self.bias is None else local_weight(self.bias)
        return F.linear(x, local_weight(self.weight), bias)


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
            "weight": ParameterSpec(placement=Replicate(), init="normal"),
            "bias": ParameterSpec(placement=Replicate(), init="zeros"),
        }

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, i] -> [b, s, len(rows)]."""
        bias = None if self.bias is None else local_weight(self.bias, partial=True)[self.rows]
        return F.linear(x, local_weight(self.weight, partial=True)[self.rows], bias)


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
            "bias": ParameterSpec(placement=Replicate(), init="zeros"),
        }

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, i/tp] -> [b, s, o], with sequence parallelism [b, s/tp, o]."""
        out = self.tp.leave(F.linear(x, local_weight(self.weight)))
        if self.bias is None:
            return out
        # After the sum, or every rank would add it.
        return out + local_weight(self.bias, partial=self.tp.splits_sequence)
