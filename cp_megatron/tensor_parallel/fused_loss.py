"""Head and loss fused: the cross-entropy of hidden states, without the logits of all tokens.

Logits are the largest tensor of a model with a large vocabulary: 32K tokens x 128K ids are 16 GiB.
Here the head's weight multiplies a chunk of tokens at a time; the losses and the gradients of the
chunk are computed at once, and its logits are freed. Only gradients remain of the whole sequence,
and they are as wide as the hidden states (the idea of Liger Kernel, Hsu et al. 2024,
arXiv:2410.10989, here over a vocabulary split by tensor parallelism):

    rows of the residual stream   |  c  |  c  |  c  |
                                     |
              gather over tp         |  with sequence parallelism, rows of this chunk only
                                     v
                     logits [b, c * tp, v/tp] -> losses, d logits   (in the memory of all chunks)
                                     |
                +--------------------+------------------+
                v                                       v
        dx [b, c, h], summed over tp         dw [v/tp, h] += d logits^T x

Forward computes the gradients of the plain *sum* of the losses; the true ones are a multiple, which
backward knows. dw exists from the end of forward on, when all activations exist.

Shapes: b batch, r rows of the residual stream, s = r, with sequence parallelism r * tp, tokens,
h hidden, v padded vocabulary, c rows of a chunk, n tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cp_megatron.comm.trace import traced
from cp_megatron.config import tokens_with_logits
from cp_megatron.kernels.cross_entropy import cross_entropy_kernels
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.logit_transform import LogitTransform, VocabularyPart
from cp_megatron.tensor_parallel.group import TensorParallel
from cp_megatron.tensor_parallel.loss import IGNORED, combine


@dataclass(frozen=True, kw_only=True)
class LossRule:
    """Which loss is trained, and how many tokens are computed at once.

    Attributes:
        chunk_size: number of tokens whose logits exist at once; None: see ``tokens_with_logits``.
        z_loss_coeff: adds this times the square of each token's log-sum-exp to the loss that is
            trained, so that logits do not drift (Chowdhery et al. 2022, arXiv:2204.02311, section
            5).
    """

    chunk_size: int | None = None
    z_loss_coeff: float = 0.0


def vocab_parallel_fused_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    tp: TensorParallel,
    rule: LossRule,
    transform: LogitTransform | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, which is trained, and the cross-entropy of each token, for metrics.

    Args:
        x: residual stream [b, r, h] of any floating dtype, as ``TensorParallel.enter`` takes it.
        weight: [v/tp, h], this rank's part of the head in rank order.
        labels: [b, s] int64, the same on all tp ranks; -100 marks a token that does not count.
        vocab_size: number of ids without padding.
        tp: the group that shares the vocabulary.
        rule: the z-loss and the size of chunks.
        transform: how the products with ``weight`` become logits; None leaves them as they are.

    Returns:
        A scalar, the sum of cross-entropy and z-loss in nats over the tokens that count; and the
        cross-entropies [b, s], which have no gradient and are exactly 0 for tokens that do not
        count. Both are float32 (float64 for float64) and the same on all tp ranks. The gradient of
        ``x`` is the true one, summed over the vocabulary; that of ``weight`` is this rank's part.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    first = tp.rank * weight.shape[0]
    part = VocabularyPart(
        first=first,
        num_valid=min(max(0, vocab_size - first), weight.shape[0]),
        transform=transform or LogitTransform(),
    )
    chunk = _Chunk(tp=tp, part=part, rule=rule)
    return _FusedLoss.apply(x, weight, labels, chunk, wanted)


class _FusedLoss(torch.autograd.Function):
    """Forward computes the gradients of the sum; backward scales them in place, so it runs once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk: _Chunk, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        batch, num_rows = x.shape[:2]
        gathered = chunk.tp.size if chunk.tp.splits_sequence else 1
        exact = accumulation_dtype(x.dtype)
        losses = x.new_empty(labels.shape, dtype=exact)
        total = x.new_zeros((), dtype=exact)
        dx = torch.empty_like(x) if wanted else None
        dw = torch.empty_like(weight, dtype=exact) if wanted else None
        # [b, tp * r] -> [b, tp, r]: a chunk of rows holds tokens of every rank
        by_rank = labels.unflatten(1, (gathered, num_rows))
        losses_by_rank = losses.unflatten(1, (gathered, num_rows))
        tokens = tokens_with_logits(chunk.rule.chunk_size, weight.shape[0], on_cuda=x.is_cuda)
        at_once = min(chunk.tp.rows(tokens, batch), num_rows)
        # One memory for all chunks: the CPU's allocator would map new pages for each.
        logits = x.new_empty(batch * gathered * at_once, weight.shape[0])
        for start in range(0, num_rows, at_once):
            rows = slice(start, min(start + at_once, num_rows))
            with traced("head and loss"):
                own, summed, entered, dlogits = chunk.forward(
                    x[:, rows], weight, by_rank[..., rows], logits, wanted
                )
                losses_by_rank[..., rows] = own
                total += summed
                if dx is not None and dw is not None:
                    add_product_(dw, dlogits.T, entered, first=start == 0)
                    dx[:, rows] = chunk.backward(dlogits, weight, batch)
                # Otherwise the logits of two chunks could exist at once.
                del own, summed, entered, dlogits
        ctx.grads = dx, dw
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "backward of the loss runs once"
        (dx, dw), ctx.grads = ctx.grads, None
        x_dtype, weight_dtype = ctx.dtypes
        dx = dx.mul_(grads[0].to(dx.dtype)).to(x_dtype)
        dw = dw.mul_(grads[0].to(dw.dtype)).to(weight_dtype)
        return dx, dw, None, None, None


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Computes one chunk, from rows to losses and back."""

    tp: TensorParallel
    part: VocabularyPart
    rule: LossRule

    def forward(
        self, rows: Tensor, weight: Tensor, labels: Tensor, logits: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows [b, c, h] and labels [b, tp, c] -> losses, and their gradient if it is wanted.

        ``logits`` [at least n, v/tp] is overwritten, and so is what was returned before.

        Returns:
            The losses [b, tp, c]; the sum to train; the tokens [n, h]; and the gradient of their
            products with the weight [n, v/tp] in the type of ``logits``.
        """
        z, multiplier = self.rule.z_loss_coeff, self.part.transform.multiplier
        # [b, c, h] -> [b, tp * c, h] -> [n, h]
        x = self.tp.enter(rows).flatten(0, 1)
        dlogits = products = torch.mm(x, weight.T, out=logits[: len(x)])
        flat = labels.flatten()
        kernels = cross_entropy_kernels(products.device.type)
        own_lse, own_target, kept = kernels.statistics(products, flat, self.part)
        lse, target = combine(own_lse, own_target, self.tp.group)
        counts = flat != IGNORED
        losses = torch.where(counts, lse - target, 0.0)
        total = losses.sum()
        if z:
            total = total + z * torch.where(counts, lse, 0.0).square().sum()
        if wanted:
            # (softmax * (1 + 2 z lse) - one_hot(label)) * multiplier, and then the softcap's slope
            scale = torch.where(counts, multiplier + 2 * z * multiplier * lse, 0.0)
            gradient = kernels.gradient(kept, flat, self.part, lse, scale)
            same_type = gradient.dtype == products.dtype
            dlogits = gradient if same_type else products.copy_(gradient)
        return losses.view(labels.shape), total, x, dlogits

    def backward(self, dlogits: Tensor, weight: Tensor, batch: int) -> Tensor:
        """The gradient of the products [n, v/tp] -> that of the rows [b, c, h]."""
        return self.tp.leave((dlogits @ weight).unflatten(0, (batch, -1)))


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total [m, h] += a [m, n] @ b [n, h]; if it is the first product, total = a @ b.

    ``total`` has the type of sums. A product in bfloat16 is rounded only after it was added where
    PyTorch can do so, which is on CUDA, and before elsewhere.
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
