"""Collectives with stated gradients, for activations.

Every function takes the group to talk to; ``None`` or a group of one rank is the identity and
sends nothing. Inputs are never modified. The pairs are conjugate: the backward of one is the
forward of the other (Shoeybi et al. 2019, arXiv:1909.08053 section 3; Korthikanti et al. 2022,
arXiv:2205.05198 section 4.2.2 for the gather and scatter along the sequence).

Gradients follow one rule: the objective is the *sum* of what the ranks compute from their own
values, except that a value held alike by all ranks of a tensor parallel group counts once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.nonblocking import start_all_gather, start_reduce_scatter


def copy_to_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The same tensor, about to be used by every rank of the group with different weights.

    Forward: identity. Backward: all-reduce (sum) of the gradients.
    """
    return x if _alone(group) else _CopyToGroup.apply(x, group)


def reduce_from_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of the ranks' tensors, on every rank.

    Forward: all-reduce (sum). Backward: identity (the ranks' gradients are alike).
    """
    return x if _alone(group) else _ReduceFromGroup.apply(x, group)


def all_gather_dim(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """The ranks' tensors one after the other along ``dim``: ``[.., n, ..] -> [.., ranks * n, ..]``.

    Forward: all-gather. Backward: reduce-scatter (sum) along ``dim``.
    """
    return x if _alone(group) else _AllGatherDim.apply(x, dim, group)


def reduce_scatter_dim(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """This rank's slice of the ranks' sum: ``[.., ranks * n, ..] -> [.., n, ..]``.

    Forward: reduce-scatter (sum). Backward: all-gather along ``dim``. The size of ``dim`` must be
    divisible by the number of ranks.
    """
    return x if _alone(group) else _ReduceScatterDim.apply(x, dim, group)


def _alone(group: ProcessGroup | None) -> bool:
    return group is None or group.size() == 1


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    dim %= x.ndim
    stacked = start_all_gather(x.contiguous().unsqueeze(0), group).wait()  # [ranks, .., n, ..]
    # [ranks, .., n, ..] -> [.., ranks, n, ..] -> [.., ranks * n, ..]
    return stacked.movedim(0, dim).flatten(dim, dim + 1)


def _scatter_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    dim %= x.ndim
    ranks = group.size()
    assert x.shape[dim] % ranks == 0, f"dim {dim} of {tuple(x.shape)} over {ranks} ranks"
    # [.., ranks * n, ..] -> [.., ranks, n, ..] -> [ranks, .., n, ..]
    stacked = x.unflatten(dim, (ranks, -1)).movedim(dim, 0).contiguous()
    return start_reduce_scatter(stacked, group).wait().squeeze(0)


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _AllGatherDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_sum(grads[0], ctx.dim, ctx.group), None, None


class _ReduceScatterDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scatter_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.dim, ctx.group), None, None
