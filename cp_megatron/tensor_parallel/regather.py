"""Sequence parallelism without its price in memory: gathered rows are forgotten, gathered again.

Column parallel layers need the tokens of all tp ranks, in forward for their result and in backward
for their weights' gradients. Kept in between they would be the one thing of a layer that tensor
parallelism does not divide (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2):

    forward    rows [b, s/tp, h] -> gathered [b, s, h] -> layers -> result     gathered: no memory
    backward   rows [b, s/tp, h] -> gathered [b, s, h] -> layers' gradients    any more

As FSDP does it with weights, the tensor stays and its storage is emptied and filled: the layers in
between know nothing of it.

Shapes: b batch, s sequence of one context parallel rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.tensor_parallel.parameters import TensorParallel


def entered(
    function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, tp: TensorParallel
) -> tuple[Tensor, ...]:
    """``function(tp.enter(x))``, of which backward keeps ``x`` and not what was gathered.

    Args:
        function: its results are no views of its argument.
        x: residual stream.
        tp: the group that shares the weights.
    """
    whole = tp.enter(x)
    results = function(whole)
    if not tp.splits_sequence or not torch.is_grad_enabled():
        return results
    found: tuple[Tensor, ...] = _Forget.apply(whole.detach(), x.detach(), tp, *results)
    return found


class _Forget(torch.autograd.Function):
    """Forward: the results; ``whole`` loses its memory. Backward: the gradients, once ``whole`` has
    it back, before the functions behind the results read it."""

    @staticmethod
    def forward(
        ctx: Any, whole: Tensor, x: Tensor, tp: TensorParallel, *results: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.tp, ctx.storage = tp, whole.untyped_storage()
        ctx.shape, ctx.strides = whole.shape, whole.stride()
        ctx.num_bytes = ctx.storage.nbytes()
        ctx.storage.resize_(0)
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gathered = all_gather_dim(x, 1, ctx.tp.group)
        ctx.storage.resize_(ctx.num_bytes)
        # A tensor of its own over that storage: autograd must not take it for a change.
        target = torch.empty(0, dtype=x.dtype, device=x.device)
        target.set_(ctx.storage, 0, ctx.shape, ctx.strides).copy_(gathered)
        return None, None, None, *grads
