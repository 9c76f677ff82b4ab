"""Linear layers whose weight is split over the tp ranks (Shoeybi et al. 2019, arXiv:1909.08053).

The input of a column parallel layer has passed ``TensorParallel.enter``, once for all layers that
share it (q, k, v; gate, up). The output of a row parallel layer goes to ``TensorParallel.leave``.

Shapes: b batch, s sequence of one context parallel rank, i in features, o out features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.spec import LinearSpec
from cp_megatron.tensor_parallel.group import TensorParallel
from cp_megatron.tensor_parallel.placement import SpecifiedModule, shared_unit


class ColumnParallelLinear(SpecifiedModule):
    """Output features are split: [b, s, i] on every rank -> [b, s, o/tp].

    If there are fewer units (key/value heads) than ranks, every rank holds all output features and
    computes those of one unit. Its gradient is zero outside of them and a summand inside.
    """

    def __init__(self, spec: LinearSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.rows = shared_unit(self.specs["weight"], tp)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, i] -> [b, s, o/tp], or the features of one unit."""
        weight, bias = self.local("weight"), self.local_bias()
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        return F.linear(x, weight, bias)


class RowParallelLinear(SpecifiedModule):
    """Input features are split: [b, s, i/tp] -> this rank's summand [b, s, o] of the result.

    The bias is not added here, or every rank would add it: ``TensorParallel.leave`` takes it.
    """

    def forward(self, x: Tensor, gradient_only: bool = False) -> Tensor:
        """[b, s, i/tp] -> [b, s, o].

        With ``gradient_only`` the values of the result are never read, only gradients pass through
        it. Nothing is computed in forward, and the values are arbitrary.
        """
        if gradient_only:
            result: Tensor = _ProductGradientOnly.apply(x, self.local("weight"))
            return result
        return F.linear(x, self.local("weight"))


class _ProductGradientOnly(torch.autograd.Function):
    """Forward: one uninitialized number, expanded. Backward: that of ``F.linear(x, weight)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(()).expand(*x.shape[:2], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        # [b, s, o] and [b, s, i/tp] -> [o, i/tp]
        return grads[0] @ weight, grads[0].flatten(0, 1).T @ x.flatten(0, 1)
