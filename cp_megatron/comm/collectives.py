"""Collectives with defined gradients, for activations.

Every function takes a group; with ``None`` or a group of one rank it is the identity and sends
nothing. Inputs are never modified. The functions form conjugate pairs: the backward of one is the
forward of the other (Shoeybi et al. 2019, arXiv:1909.08053 section 3; Korthikanti et al. 2022,
arXiv:2205.05198 section 4.2.2 for the gather and scatter along the sequence).

``start_...`` are the same operations without gradients: they begin now, and the function that they
return waits for the result, so that a product can be computed meanwhile.

All gradients follow one rule: the objective is the *sum* of what the ranks compute from their own
values, except that a value which all ranks of a tensor parallel group share counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.nonblocking import Started, start_all_gather, start_reduce_scatter


def copy_to_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns the same tensor, which every rank of the group uses with different weights.

    Forward: identity. Backward: all-reduce (sum) of the gradients.
    """
    return _apply(x, group, lambda y, _: y.view_as(y), _sum)


def reduce_from_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns the sum of the ranks' tensors on every rank.

    Forward: all-reduce (sum). Backward: identity, because the ranks' gradients are equal.
    """
    return _apply(x, group, _sum, lambda grad, _: grad)


def all_gather_dim(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Concatenates the ranks' tensors along ``dim``: ``[.., n, ..] -> [.., ranks * n, ..]``.

    Forward: all-gather. Backward: reduce-scatter (sum) along ``dim``.
    """
    return _apply(x, group, lambda y, g: _gather(y, dim, g), lambda y, g: _scatter_sum(y, dim, g))


def reduce_scatter_dim(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Returns this rank's slice of the ranks' sum: ``[.., ranks * n, ..] -> [.., n, ..]``.

    Forward: reduce-scatter (sum). Backward: all-gather along ``dim``. The size of ``dim`` must be
    divisible by the number of ranks.
    """
    return _apply(x, group, lambda y, g: _scatter_sum(y, dim, g), lambda y, g: _gather(y, dim, g))


def exchange_rows(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup | None
) -> Tensor:
    """Sends some rows to every rank of the group: ``[sum(sent), ..] -> [sum(received), ..]``.

    Forward: all-to-all. Backward: the reverse exchange, in which gradients return to their rows.

    Args:
        x: the rows, in the order of the ranks that they are for.
        sent: rows for each rank.
        received: rows from each rank, of which the result consists, in this order.
        group: the ranks.
    """
    return _apply(
        x,
        group,
        lambda y, g: _all_to_all(y, sent, received, g),
        lambda y, g: _all_to_all(y, received, sent, g),
    )


Wait = Callable[[], Tensor]
"""Waits for a result; on CUDA, the current stream waits instead of the host."""


def start_sum_(x: Tensor, group: ProcessGroup | None) -> Wait:
    """Starts an all-reduce (sum) in the memory of ``x``, which is contiguous."""
    if group is None or group.size() == 1:
        return lambda: x
    return Started(dist.all_reduce(x, group=group, async_op=True), x, x).wait


def start_gather(x: Tensor, dim: int, group: ProcessGroup | None) -> Wait:
    """Starts an all-gather, ``[.., n, ..] -> [.., ranks * n, ..]``."""
    if group is None or group.size() == 1:
        return lambda: x
    dim %= x.ndim
    started = start_all_gather(x.contiguous().unsqueeze(0), group)  # [ranks, .., n, ..]
    # [ranks, .., n, ..] -> [.., ranks, n, ..] -> [.., ranks * n, ..]
    return lambda: started.wait().movedim(0, dim).flatten(dim, dim + 1)


def start_scatter_sum(x: Tensor, dim: int, group: ProcessGroup | None) -> Wait:
    """Starts a reduce-scatter (sum), ``[.., ranks * n, ..] -> [.., n, ..]``."""
    if group is None or group.size() == 1:
        return lambda: x
    dim %= x.ndim
    ranks = group.size()
    assert x.shape[dim] % ranks == 0, f"dim {dim} of {tuple(x.shape)} over {ranks} ranks"
    # [.., ranks * n, ..] -> [.., ranks, n, ..] -> [ranks, .., n, ..]
    stacked = x.unflatten(dim, (ranks, -1)).movedim(dim, 0).contiguous()
    started = start_reduce_scatter(stacked, group)
    return lambda: started.wait().squeeze(0)


_Operation = Callable[[Tensor, ProcessGroup], Tensor]


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProcessGroup, forward: _Operation, backward: _Operation
    ) -> Tensor:
        ctx.group, ctx.operation = group, backward
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.operation(grads[0], ctx.group), None, None, None


def _apply(
    x: Tensor, group: ProcessGroup | None, forward: _Operation, backward: _Operation
) -> Tensor:
    if group is None or group.size() == 1:
        return x
    result: Tensor = _Collective.apply(x, group, forward, backward)
    return result


def _all_to_all(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup
) -> Tensor:
    assert sum(sent) == x.shape[0], f"{sum(sent)} of {x.shape[0]} rows are sent"
    result = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(result, x.contiguous(), list(received), list(sent), group=group)
    return result


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    return start_sum_(x.clone(memory_format=torch.contiguous_format), group)()


def _gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return start_gather(x, dim, group)()


def _scatter_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return start_scatter_sum(x, dim, group)()
