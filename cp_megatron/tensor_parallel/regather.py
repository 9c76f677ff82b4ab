"""Sequence parallelism without its cost in memory: gathered rows are gathered again in backward.

Column parallel layers need the tokens of all tp ranks, in forward for their result and in backward
for the gradients of their weights. If these were kept in between, they would be the only tensors of
a layer that tensor parallelism does not divide (Korthikanti et al. 2022, arXiv:2205.05198, section
4.2.2):

    forward    rows [b, s/tp, h] -> gathered [b, s, h] -> layers -> result     its memory is freed
    backward   rows [b, s/tp, h] -> gathered [b, s, h] -> gradients of the layers

As FSDP does with weights, the tensor object stays while its storage is emptied and filled again, so
the layers in between need not know.

Shapes: b batch, s sequence of one context parallel rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.tensor_parallel.group import TensorParallel

Results = TypeVar("Results", Tensor, tuple[Tensor, ...])


def regathered(
    function: Callable[..., Results],
    gathered: Tensor,
    *args: object,
    rows: Tensor,
    tp: TensorParallel,
) -> Results:
    """``function(gathered, *args)``, of which backward keeps ``rows`` instead of ``gathered``.

    Args:
        function: returns one or several tensors that are no views of its first argument.
        gathered: [b, s, h], what ``tp.enter`` returned for ``rows``.
        args: further arguments.
        rows: residual stream [b, s/tp, h].
        tp: the group; with replicated rows, or without gradients, the function is just called.
    """
    results = function(gathered, *args)
    if not tp.splits_sequence or not torch.is_grad_enabled():
        return results
    outputs = (results,) if isinstance(results, Tensor) else results
    kept: tuple[Tensor, ...] = _Release.apply(gathered.detach(), rows.detach(), tp, *outputs)
    return kept[0] if isinstance(results, Tensor) else kept


class _Release(torch.autograd.Function):
    """Forward: returns the results and frees the memory of ``gathered``. Backward: returns the
    gradients, after filling ``gathered`` for the functions that computed the results."""

    @staticmethod
    def forward(
        ctx: Any, gathered: Tensor, rows: Tensor, tp: TensorParallel, *results: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows)
        ctx.tp, ctx.storage = tp, gathered.untyped_storage()
        ctx.shape, ctx.strides = gathered.shape, gathered.stride()
        ctx.num_bytes = ctx.storage.nbytes()
        ctx.storage.resize_(0)
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        gathered = all_gather_dim(rows, 1, ctx.tp.group)
        ctx.storage.resize_(ctx.num_bytes)
        # A new tensor over that storage, so that autograd does not see an in-place change.
        target = torch.empty(0, dtype=rows.dtype, device=rows.device)
        target.set_(ctx.storage, 0, ctx.shape, ctx.strides).copy_(gathered)
        return None, None, None, *grads
