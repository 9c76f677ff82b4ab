"""Cross-entropy on logits whose vocabulary is split over the tp ranks.

The full logits never exist on one rank: per token, one number is reduced for the maximum and two
for the sum (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053 section 3).

Shapes: .. tokens, v padded vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.kernels.cross_entropy import target_logits
from cp_megatron.kernels.interface import accumulation_dtype

IGNORED = -100


@torch.no_grad()
def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: ProcessGroup | None
) -> Tensor:
    """The loss of every token, -log softmax(logits)[label] in nats, not reduced.

    It has no gradient; ``vocab_parallel_fused_loss`` is the loss that trains.

    Args:
        logits: [.., v/tp] of any floating dtype, this rank's part in rank order; -inf for padding.
        labels: [..] int64, ids of the whole vocabulary, the same on all ranks of the group; -100
            marks a token that does not count.
        group: the tp group; None is one rank.

    Returns:
        [..] float32 (float64 for float64 logits), the same on all ranks; exactly 0 for tokens that
        do not count.
    """
    exact = logits.to(accumulation_dtype(logits.dtype))
    rank = 0 if group is None else group.rank()
    target = target_logits(exact, labels, rank * logits.shape[-1])
    lse, target = combine(exact.logsumexp(-1), target, group)
    return torch.where(labels != IGNORED, lse - target, 0.0)


def combine(lse: Tensor, target: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Reduces numbers of the ranks' parts [..] to those of the whole vocabulary.

    Args:
        lse: the log-sum-exp of this rank's part; -inf, or the least finite number, if it is empty.
        target: the logit of the label, or 0 where another rank has it.
        group: the tp group.

    Returns:
        The log-sum-exp and the logit of the label.
    """
    if group is None or group.size() == 1:
        return lse, target
    highest = lse.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    both = torch.stack((torch.exp(lse - highest), target))  # [2, ..]
    dist.all_reduce(both, group=group)
    return highest + both[0].log(), both[1]
