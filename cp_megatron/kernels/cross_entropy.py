"""Cross-entropy of one rank's part of the logits, in two passes around what the ranks exchange.

The first pass finds the log-sum-exp and the label's logit of each row. When those of all ranks are
combined, the second pass computes the gradient of the products. Eager PyTorch does both in the
type of sums. On a GPU with Triton each pass is one kernel (``cross_entropy_triton.py``), and no
other tensor of the size of the products exists.

Shapes: n tokens, v padded vocabulary; this rank has v/tp columns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.logit_transform import VocabularyPart

Kept = tuple[Tensor, ...]


class CrossEntropyKernels(NamedTuple):
    """The two passes.

    Attributes:
        statistics: products [n, v/tp] of any floating type, labels [n] int64 (those that do not
            count are negative), part -> the log-sum-exp [n] of the part's logits and the logit [n]
            of the label, 0 if it is in another part, both in the type of sums; and what
            ``gradient`` takes. The products are overwritten. If all columns are padding, the
            log-sum-exp is -inf or the least finite number.
        gradient: what the first pass kept, labels [n], part, the log-sum-exp [n] of the whole
            vocabulary, scale [n] -> the gradient of the products [n, v/tp], which is
            (softmax * scale - multiplier * one_hot(label)) * the slope of the softcap and 0 for
            padding. It has the type of the products or that of sums.
    """

    statistics: Callable[[Tensor, Tensor, VocabularyPart], tuple[Tensor, Tensor, Kept]]
    gradient: Callable[[Kept, Tensor, VocabularyPart, Tensor, Tensor], Tensor]


@cache
def cross_entropy_kernels(device_type: str) -> CrossEntropyKernels:
    """The fastest functions on a kind of device."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return CrossEntropyKernels(statistics_eager, gradient_eager)
    # The package is optional.
    from cp_megatron.kernels.cross_entropy_triton import gradient_triton, statistics_triton

    return CrossEntropyKernels(statistics_triton, gradient_triton)


def statistics_eager(
    products: Tensor, labels: Tensor, part: VocabularyPart
) -> tuple[Tensor, Tensor, Kept]:
    """``CrossEntropyKernels.statistics`` in eager PyTorch."""
    exact = products.to(accumulation_dtype(products.dtype))
    logits, bounded = part.transform.forward(exact)
    # Not -inf: of a part that holds only padding the softmax would be NaN.
    logits[:, part.num_valid :] = torch.finfo(logits.dtype).min
    target = target_logits(logits, labels, part.first)
    # The largest probability is 1 / sum(exp(logit - maximum)). PyTorch's softmax computes each row
    # in the cache, so that this is faster than the same by exp and sum.
    maximum = logits.amax(1)
    softmax = torch.softmax(logits, 1, out=logits)
    lse = maximum - softmax.amax(1).log()
    return lse, target, (softmax, lse) if bounded is None else (softmax, lse, bounded)


def gradient_eager(
    kept: Kept, labels: Tensor, part: VocabularyPart, lse: Tensor, scale: Tensor
) -> Tensor:
    """``CrossEntropyKernels.gradient`` in eager PyTorch."""
    grad, own_lse, *bounded = kept
    scale = scale * torch.exp(own_lse - lse)
    grad.mul_(scale.unsqueeze(1))
    local, here = local_labels(labels, part.first, grad.shape[1])
    hit = here.to(grad.dtype).unsqueeze(1)
    grad.scatter_add_(1, local, hit.mul_(-part.transform.multiplier))
    part.transform.backward_(grad, bounded[0] if bounded else None)
    return grad


def target_logits(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """The logits [.., v/tp] of labels [..], 0 where the label is not among these columns.

    ``first`` is the id of the first column.
    """
    local, here = local_labels(labels, first, logits.shape[-1])
    return torch.where(here, logits.gather(-1, local).squeeze(-1), 0.0)


def local_labels(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Finds labels [..] among the columns of the ids ``first`` to ``first + width - 1``.

    Returns:
        [.., 1] the column, an arbitrary valid one if the label is elsewhere; bool [..], whether it
        is here.
    """
    local = labels - first
    here = (local >= 0) & (local < width)  # never for labels that do not count: they are negative
    return local.clamp(0, width - 1).unsqueeze(-1), here
