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
from torch.autograd.function import once_differentiable

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
        return F.linear(x, *self.operands())

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that this rank computes with, [o/tp, i] and [o/tp]."""
        weight, bias = self.local("weight"), self.local_bias()
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        return weight, bias


def products(x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
    """What each layer computes of the input that they share, [b, s, i] -> several [b, s, o/tp].

    Backward adds up their gradients of x in one tensor, in the products themselves. The results can
    be differentiated once.
    """
    if torch.compiler.is_compiling():  # the compiler differentiates it
        return tuple(layer(x) for layer in layers)
    operands = (layer.operands() for layer in layers)
    weights, biases = zip(*operands, strict=True)
    results: tuple[Tensor, ...] = _SharedInput.apply(x, *weights, *biases)
    return results


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


class _SharedInput(torch.autograd.Function):
    """Forward: ``F.linear(x, weight, bias)`` of k weights and k biases, some of which are None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights, biases = operands[: len(operands) // 2], operands[len(operands) // 2 :]
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, *pair) for pair in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needed, k = ctx.needs_input_grad, len(weights)
        rows = x.reshape(-1, x.shape[-1])  # [b, s, i] -> [b * s, i]
        dx: Tensor | None = None
        dweights: list[Tensor | None] = [None] * k
        dbiases: list[Tensor | None] = [None] * k
        for place, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            if grad is None:
                continue
            grad = grad.reshape(-1, grad.shape[-1])  # [b, s, o] -> [b * s, o]
            if needed[0]:
                dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
            if needed[1 + place]:
                dweights[place] = grad.T @ rows
            if needed[1 + k + place]:
                dbiases[place] = grad.sum(0)
        return None if dx is None else dx.view(x.shape), *dweights, *dbiases
