"""Norms of heads that are split over the tp ranks, whose weight is not shared by the heads.

OLMo 2 normalizes all heads of a token as one vector (Ai2 2025, arXiv:2501.00656), so the statistics
are means over the channels of all ranks. Cohere and StableLM 2 normalize every head by itself, with
a weight of its own.

Where ranks share a head of keys, every head is shared by equally many ranks. The means over ranks
are therefore those over heads, and the sum of what the copies of a head add to a gradient is the
head's gradient.

Shapes: b batch, s sequence of one context parallel rank, n heads of this tp rank, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.collectives import all_gather_dim, reduce_from_group
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.spec import HeadNormSpec
from cp_megatron.tensor_parallel.group import TensorParallel
from cp_megatron.tensor_parallel.placement import SpecifiedModule, shared_unit


class _HeadsNorm(SpecifiedModule):
    """LayerNorm or RMSNorm, computed in the type of sums and rounded once."""

    def __init__(self, spec: HeadNormSpec, vector: _Vector, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.centers, self.epsilon = spec.kind == "LayerNorm", spec.epsilon
        self.offset = 1.0 if spec.one_plus else 0.0
        self.vector = vector
        self.rows = shared_unit(self.specs["weight"], tp)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, n, d] -> [b, s, n, d]."""
        weight, bias = self.local("weight"), self.local_bias()
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        # [n * d] or [n, d] -> [n, d]
        weight, bias = weight.view(x.shape[2:]), None if bias is None else bias.view(x.shape[2:])
        out: Tensor = _Normalize.apply(x, weight, bias, self)
        return out


class AllHeadsNorm(_HeadsNorm):
    """All heads of a token are one vector; the weight is [heads * d].

    Forward and backward send one message each: one number per token, two for a LayerNorm.
    """

    def __init__(self, spec: HeadNormSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, _Vector(dims=(-2, -1), group=tp.group), tp=tp)


class EachHeadNorm(_HeadsNorm):
    """Every head is a vector and has a weight of its own; the weight is [heads, d]."""

    def __init__(self, spec: HeadNormSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, _Vector(dims=(-1,), group=None), tp=tp)


@dataclass(frozen=True, kw_only=True)
class _Vector:
    """What is normalized together: some dims of [b, s, n, d], on the ranks of a group.

    The ranks hold equally many elements, so a mean is the mean of the ranks' means.
    """

    dims: tuple[int, ...]
    group: ProcessGroup | None

    def average(self, *own: Tensor) -> Tensor:
        """The means over the ranks of k tensors: [k, ..], from one message."""
        stacked = torch.stack(own)
        if self.group is None:
            return stacked
        return reduce_from_group(stacked, self.group) / self.group.size()

    def mean(self, x: Tensor) -> Tensor:
        """[b, s, n, d] -> this rank's mean [b, s, 1 or n, 1]."""
        return x.mean(self.dims, keepdim=True)

    def mean_square(self, x: Tensor) -> Tensor:
        """[b, s, n, d] -> [b, s, 1 or n, 1] in the type of sums."""
        exact = accumulation_dtype(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=self.dims, keepdim=True, dtype=exact)
        return self.average(norm.square() * norm.numel() / x.numel())[0]

    def variance_and_mean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s, n, d] -> two tensors [b, s, 1 or n, 1] in the type of sums, from one message.

        The variance is the mean of the ranks' variances plus the variance of their means (Chan et
        al. 1979), which does not cancel as a difference of squares does.
        """
        exact = x.to(accumulation_dtype(x.dtype))
        own = torch.stack(torch.var_mean(exact, self.dims, correction=0, keepdim=True))
        # [2, b, s, 1 or n, 1] -> [2, ranks, b, s, 1 or n, 1]
        variances, means = all_gather_dim(own.unsqueeze(1), 1, self.group)
        between, mean = torch.var_mean(means, 0, correction=0)
        return variances.mean(0) + between, mean


class _Normalize(torch.autograd.Function):
    """Forward: y = (x - mean) / deviation, and the result y * weight + bias.

    Backward: with g = gradient * weight, that of x is (g - mean(g) - y * mean(g * y)) / deviation.
    The means are over all ranks, because the statistics depend on the channels of each and the
    results of each on them. An RMSNorm has no mean(x) and no mean(g). The gradients of weight and
    bias are those of this rank's heads.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, norm: _HeadsNorm
    ) -> Tensor:
        if norm.centers:
            square, mean = norm.vector.variance_and_mean(x)
        else:
            square, mean = norm.vector.mean_square(x), None
        scale = torch.rsqrt(square + norm.epsilon)
        ctx.save_for_backward(x, weight, scale, mean)
        ctx.norm, ctx.has_bias = norm, bias is not None
        y, factor = _normalized(x, scale, mean), weight.to(scale.dtype) + norm.offset
        out = torch.empty_like(x)
        if bias is None:
            return torch.mul(y, factor, out=out)
        return torch.add(y.mul_(factor), bias, out=out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, scale, mean = ctx.saved_tensors
        vector: _Vector = ctx.norm.vector
        y, factor = _normalized(x, scale, mean), weight.to(scale.dtype) + ctx.norm.offset
        product = grad * y
        dweight = product.sum((0, 1)).to(weight.dtype)
        dbias = grad.sum((0, 1), dtype=scale.dtype).to(weight.dtype) if ctx.has_bias else None
        dx, means = grad * factor, [vector.mean(product.mul_(factor))]
        del product
        if mean is not None:
            means.append(vector.mean(dx))
        along, *shift = vector.average(*means)
        dx.addcmul_(y, along, value=-1)
        for each in shift:
            dx.sub_(each)
        return torch.mul(dx, scale, out=torch.empty_like(x)), dweight, dbias, None


def _normalized(x: Tensor, scale: Tensor, mean: Tensor | None) -> Tensor:
    """[b, s, n, d], in the type of sums."""
    return x * scale if mean is None else (x - mean).mul_(scale)
