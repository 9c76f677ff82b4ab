"""Cross-entropy on logits whose vocabulary is split over the tp ranks.

The full logits never exist on one rank: per token, one number is reduced for the maximum and two
for the sum (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053 section 3).

Shapes: .. tokens, v padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

IGNORED = -100


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: ProcessGroup | None
) -> Tensor:
    """The loss of every token, -log softmax(logits)[label] in nats, not reduced.

    Args:
        logits: [.., v/tp] of any floating dtype, this rank's part in rank order; -inf for padding.
        labels: [..] int64, ids of the whole vocabulary, the same on all ranks of the group; -100
            marks a token that does not count.
        group: the tp group; None is one rank.

    Returns:
        [..] float32 (float64 for float64 logits), the same on all ranks; exactly 0 for tokens that
        do not count. The gradient of ``logits`` has their dtype, is this rank's part of the true
        one, exactly 0 for padding and for tokens that do not count, and needs no message.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup | None) -> Tensor:
        rank = 0 if group is None else group.rank()
        width = logits.shape[-1]
        local = labels - rank * width
        here = (local >= 0) & (local < width)  # never for IGNORED, which is negative
        local = local.clamp(0, width - 1)  # [..], a valid index even if the label is elsewhere

        exact = logits.to(accumulation_dtype(logits.dtype))
        target = exact.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        target = torch.where(here, target, 0.0)
        lse, target = _combine(exact.logsumexp(-1), target, group)

        counts = labels != IGNORED
        ctx.save_for_backward(logits, lse, local, here, counts)
        return torch.where(counts, lse - target, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, lse, local, here, counts = ctx.saved_tensors
        # softmax - one_hot(label), times the token's gradient
        out = (logits.to(lse.dtype) - lse.unsqueeze(-1)).exp_()
        out.scatter_add_(-1, local.unsqueeze(-1), -here.to(out.dtype).unsqueeze(-1))
        out.mul_(torch.where(counts, grads[0], 0.0).unsqueeze(-1))
        return out.to(logits.dtype), None, None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums of numbers of ``dtype`` (losses, gradients) are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _combine(lse: Tensor, target: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Per rank (log-sum-exp, target logit or 0) [..] -> those of the whole vocabulary.

    A rank that holds only padding has lse -inf and adds exp(-inf) = 0.
    """
    if group is None or group.size() == 1:
        return lse, target
    maximum = lse.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    both = torch.stack((torch.exp(lse - maximum), target))  # [2, ..]
    dist.all_reduce(both, group=group)
    return maximum + both[0].log(), both[1]
