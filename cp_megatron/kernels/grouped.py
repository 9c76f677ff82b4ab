"""Linears of several experts in one call: every expert multiplies the rows that were sent to it.

    rows of x, sorted by expert   | expert 0 | expert 1 | expert 3 |      expert 2 has none
    y                             | x W_0^T  | x W_1^T  | x W_3^T  |

On a CPU, one call of oneMKL computes small products in float32 and float64 (``grouped_mkl.py``).
Otherwise one ``F.grouped_mm`` does where it takes the tensors: it needs a type other than float64,
rows that are a multiple of 16 bytes and, on a GPU, bfloat16 and compute capability 9.0, below which
it copies the offsets to the host. Elsewhere one product per expert writes into its slice of the
result. On a CPU the last two give the same bits.

Autograd through ``weight[e]`` would add up E gradients of the size of ``weight``. Backward here
allocates one, and every expert writes its slice. Products that share ``x`` have one function, so
that their gradients of ``x`` are added up in the products and not after them.

Shapes: n rows, E experts, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.kernels import grouped_mkl

_ALIGNMENT = 16
"""Rows of the tensors of ``F.grouped_mm`` are a multiple of this many bytes."""


def grouped_linear(
    x: Tensor, weight: Tensor, counts: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Multiplies each expert's rows by its weight; can be differentiated once.

    Args:
        x: [n, i], sorted by expert.
        weight: [E, o, i] of the type of ``x``.
        counts: how many rows each expert has, E numbers on the host whose sum is n; 0 is fine.
        bias: [E, o], added to an expert's rows.

    Returns:
        [n, o].
    """
    return grouped_products(x, [weight], counts, [bias])[0]


def grouped_products(
    x: Tensor,
    weights: Sequence[Tensor],
    counts: Sequence[int],
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """``grouped_linear`` with several weights, whose gradients of ``x`` are added up in one tensor.

    Args:
        x: [n, i], sorted by expert.
        weights: [E, o, i] each; o may differ.
        counts: as in ``grouped_linear``.
        biases: [E, o] or None for each weight; by default there are none.

    Returns:
        [n, o] for each weight.
    """
    for weight in weights:
        assert (len(counts), sum(counts)) == (len(weight), len(x)), (weight.shape, x.shape)
    biases = [None] * len(weights) if biases is None else biases
    results: tuple[Tensor, ...] = _GroupedProducts.apply(x, _Groups(counts), *weights, *biases)
    return results


class _GroupedProducts(torch.autograd.Function):
    """Forward: k products with k weights and k biases, some of which are None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: _Groups, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        x, k = x.contiguous(), len(operands) // 2
        ctx.save_for_backward(x, *operands[:k])
        ctx.groups = groups
        results = []
        for weight, bias in zip(operands[:k], operands[k:]):
            assert weight is not None
            y = groups.times(x, weight.transpose(1, 2))
            results.append(y if bias is None else groups.add_rows(y, bias))
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        groups, needed, k = ctx.groups, ctx.needs_input_grad, len(weights)
        dx: Tensor | None = None
        dweights: list[Tensor | None] = [None] * k
        dbiases: list[Tensor | None] = [None] * k
        for place, (grad, weight) in enumerate(zip(grads, weights)):
            if grad is None:
                continue
            dy = grad.contiguous()
            if needed[0]:
                dx = groups.times(dy, weight) if dx is None else groups.add(dx, dy, weight)
            if needed[2 + place]:
                dweights[place] = groups.outer(dy, x)
            if needed[2 + k + place]:
                dbiases[place] = groups.sums(dy)
        return dx, None, *dweights, *dbiases


class _Groups:
    """Rows that are sorted by expert, and the products with them.

    Attributes:
        counts: rows of each expert.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self._ends: Tensor | None = None

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """[n, i] and [E, i, o], of which one of the last two dims has stride 1 -> [n, o]."""
        batched = grouped_mkl.takes(x, matrices)
        if not batched and _grouped_product_takes(x, matrices):
            return F.grouped_mm(x, matrices, offs=self._ends_on(x.device))
        y, done = x.new_empty(len(x), matrices.shape[2]), set[int]()
        if batched:
            done = grouped_mkl.write_products(y, x, matrices, self.counts, adds=False)
        for rows, matrix, out in self._slices(x, matrices, y, done):
            torch.mm(rows, matrix, out=out)
        return y

    def add(self, y: Tensor, x: Tensor, matrices: Tensor) -> Tensor:
        """Adds ``times(x, matrices)`` to ``y``, and returns it."""
        if x.is_cuda and _grouped_product_takes(x, matrices):
            return y.add_(self.times(x, matrices))
        done = set[int]()
        if grouped_mkl.takes(x, matrices):
            done = grouped_mkl.write_products(y, x, matrices, self.counts, adds=True)
        for rows, matrix, out in self._slices(x, matrices, y, done):
            out.addmm_(rows, matrix)
        return y

    def outer(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy [n, o] and x [n, i] -> dy^T x of each expert, [E, o, i]; 0 if it has no rows."""
        batched = grouped_mkl.takes(x, dy)
        if not batched and _grouped_product_takes(x, dy):
            dweight = F.grouped_mm(dy.t(), x, offs=self._ends_on(x.device))
        else:
            dweight, done = x.new_empty(len(self.counts), dy.shape[1], x.shape[1]), set[int]()
            if batched:
                done = grouped_mkl.write_outer(dweight, dy, x, self.counts)
            for left, out, right in self._slices(dy, dweight, x, done):
                torch.mm(left.t(), right, out=out)
        for expert, count in enumerate(self.counts):
            if not count:
                dweight[expert].zero_()
        return dweight

    def add_rows(self, y: Tensor, bias: Tensor) -> Tensor:
        """Adds each expert's row of ``bias``, [E, o], to its rows of ``y``, [n, o]; returns it."""
        if y.is_cuda:  # a few launches instead of one for each expert
            number = torch.arange(len(y), device=y.device)
            return y.add_(bias[torch.bucketize(number, self._ends_on(y.device), right=True)])
        for rows, row in zip(y.split(self.counts), bias.unbind()):
            rows.add_(row)
        return y

    def sums(self, dy: Tensor) -> Tensor:
        """[n, o] -> the sum of each expert's rows, [E, o]."""
        ones = dy.new_ones(len(dy), _ALIGNMENT // dy.element_size())
        if dy.is_cuda and _grouped_product_takes(ones, dy):
            return self.outer(dy, ones)[:, :, 0].contiguous()
        sums = dy.new_zeros(len(self.counts), dy.shape[1])
        for rows, out in zip(dy.split(self.counts), sums.unbind()):
            if len(rows):
                torch.sum(rows, 0, out=out)
        return sums

    def _slices(
        self, x: Tensor, matrices: Tensor, y: Tensor, done: Container[int]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of x, matrix, and rows of y of each expert that has rows and is not done."""
        parts = zip(x.split(self.counts), matrices.unbind(), y.split(self.counts))
        for expert, part in enumerate(parts):
            if self.counts[expert] and expert not in done:
                yield part

    def _ends_on(self, device: torch.device) -> Tensor:
        """int32 [E]: where each expert's rows end. The host does not wait for the device."""
        if self._ends is None:
            ends = torch.tensor(list(accumulate(self.counts)), dtype=torch.int32)
            self._ends = ends.to(device, non_blocking=True)
        return self._ends


def _grouped_product_takes(*tensors: Tensor) -> bool:
    """Whether one ``F.grouped_mm`` computes a product of these tensors without a copy."""
    first = tensors[0]
    if not len(first) or first.dtype == torch.float64:
        return False
    if first.is_cuda and (
        first.dtype != torch.bfloat16 or torch.cuda.get_device_capability(first.device) < (9, 0)
    ):
        return False
    return all(map(_is_aligned, tensors))


def _is_aligned(x: Tensor) -> bool:
    """Whether one of the last two dims has stride 1, and everything else starts at a boundary."""
    *outer, rows, columns = x.stride()
    if rows == 1:
        rows, columns = columns, rows
    starts = [stride * x.element_size() for stride in (*outer, rows)]
    packed = columns == 1 and rows >= max(1, min(x.shape[-2:]))
    return packed and not any(start % _ALIGNMENT for start in (x.data_ptr(), *starts))
