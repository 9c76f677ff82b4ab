"""Linear layers whose weight is split over the tp ranks (Shoeybi et al. 2019, arXiv:1909.08053).

The input of column parallel layers enters tensor parallelism once for all layers that share it
(q, k, v; gate, up): ``products``. The output of a row parallel layer goes to
``TensorParallel.leave``.

With sequence parallelism, these layers need the tokens of all tp ranks: in forward for their
results, and in backward for the gradients of their weights. If the gathered tokens were kept in
between, they would be the only tensors of a layer that tensor parallelism does not divide, so they
are gathered again (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2). In backward, messages
travel while products are computed, as in Megatron-LM::

    messages    | gather the tokens of all ranks | sum the gradients of the tokens      |
    products    | gradients of the tokens        | gradients of the weights             |

Shapes: b batch, s sequence of one context parallel rank, i in features, o out features, r rows of
the residual stream: s/tp with sequence parallelism, else s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.comm.collectives import start_gather
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


class Entered(NamedTuple):
    """Rows of the residual stream that column parallel layers read.

    Attributes:
        rows: [b, r, i].
        tp: the group.
        keeps: whether backward keeps the gathered tokens instead of gathering them again.
    """

    rows: Tensor
    tp: TensorParallel
    keeps: bool


def products(x: Entered, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
    """What each layer computes of the input that they share, several [b, s, o/tp].

    Backward adds up their gradients of the input in one tensor, in the products themselves. The
    results can be differentiated once.
    """
    operands = (layer.operands() for layer in layers)
    weights, biases = zip(*operands, strict=True)
    results: tuple[Tensor, ...] = _SharedInput.apply(x.rows, x, *weights, *biases)
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
    """Forward: ``F.linear(x, weight, bias)`` of k weights and k biases, some of which are None, for
    the gathered rows x. Backward: the gradients of the rows, the weights and the biases."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, x: Entered, *operands: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights, biases = operands[: len(operands) // 2], operands[len(operands) // 2 :]
        ctx.tp, ctx.gathers = x.tp, x.tp.splits_sequence and not x.keeps
        gathered = start_gather(rows, 1, x.tp.group if x.tp.splits_sequence else None)()
        ctx.save_for_backward(rows if ctx.gathers else gathered, *weights)
        return tuple(F.linear(gathered, *pair) for pair in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, *weights = ctx.saved_tensors
        needed, k, tp = ctx.needs_input_grad, len(weights), ctx.tp
        if all(grad is None for grad in grads):
            return (None,) * (2 + 2 * k)
        reads = any(grad is not None and need for grad, need in zip(grads, needed[2 : 2 + k]))
        gathered = start_gather(kept, 1, tp.group if ctx.gathers and reads else None)
        # [b, s, o] -> [b * s, o]
        given = [None if grad is None else grad.flatten(0, 1) for grad in grads]
        drows = None
        if needed[0]:
            dx = _input_gradient(given, weights)
            drows = tp.start_leaving(dx.unflatten(0, (kept.shape[0], -1)))
        x = gathered().flatten(0, 1)  # [b, s, i] -> [b * s, i]
        dweights: list[Tensor | None] = [None] * k
        dbiases: list[Tensor | None] = [None] * k
        for place, grad in enumerate(given):
            if grad is not None and needed[2 + place]:
                dweights[place] = grad.T @ x
            if grad is not None and needed[2 + k + place]:
                dbiases[place] = grad.sum(0)
        return None if drows is None else drows(), None, *dweights, *dbiases


def _input_gradient(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """The sum over layers of the gradients [m, o] times the weights [o, i], [m, i]."""
    (first, weight), *others = [
        (grad, weight) for grad, weight in zip(grads, weights, strict=True) if grad is not None
    ]
    dx = first @ weight
    for grad, weight in others:
        dx.addmm_(grad, weight)
    return dx
