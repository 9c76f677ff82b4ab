"""The vocabulary split over the tp ranks, as input (embedding) and as output (head).

The vocabulary is padded to a multiple that does not depend on the tp size, so that any grid loads
any checkpoint. Padding rows start at zero, get a zero gradient and are never predicted.

Shapes: b batch, s sequence of one context parallel rank, h hidden, v padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from cp_megatron.tensor_parallel.fused_loss import LossRule, vocab_parallel_fused_loss
from cp_megatron.tensor_parallel.parameters import (
    ParameterSpec,
    SpecifiedModule,
    TensorParallel,
    local_weight,
)


class VocabParallelEmbedding(SpecifiedModule):
    """Rows of the table are split: each rank looks up the tokens it has, the sum is the result."""

    def __init__(
        self, vocab_size: int, padded_vocab: int, hidden_size: int, *, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(padded_vocab, hidden_size))
        self.specs = {"weight": ParameterSpec(placement=Shard(0), init="normal", rows=vocab_size)}

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, s] int64 in [0, vocabulary) -> residual stream [b, s, h] (or [b, s/tp, h])."""
        weight = self.local("weight")  # [v/tp, h]
        if self.tp.size == 1:
            return F.embedding(tokens, weight)
        local = tokens - self.tp.rank * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        found = F.embedding(local.masked_fill(elsewhere, 0), weight)
        return self.tp.leave(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class VocabParallelHead(SpecifiedModule):
    """Logits of this rank's part of the vocabulary; those of padding are -inf.

    Args:
        tied: own no weight; ``forward`` is given the embedding's.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        vocab_size: int,
        padded_vocab: int,
        hidden_size: int,
        *,
        tied: bool,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        weight = None if tied else nn.Parameter(torch.empty(padded_vocab, hidden_size))
        self.register_parameter("weight", weight)
        self.specs = {"weight": ParameterSpec(placement=Shard(0), init="normal", rows=vocab_size)}

    def forward(self, x: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        """Residual stream -> logits [b, s, v/tp].

        The gradient of a padding column must be zero, which every loss over a softmax gives.
        """
        weight = self._weight(tied_weight)
        logits = F.linear(self.tp.enter(x), weight)
        first_padding = self.vocab_size - self.tp.rank * weight.shape[0]
        if first_padding < weight.shape[0]:
            logits = _HidePadding.apply(logits, max(first_padding, 0))
        return logits

    def losses(
        self, x: Tensor, labels: Tensor, rule: LossRule, tied_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Residual stream and labels [b, s] -> their loss; see ``vocab_parallel_fused_loss``."""
        weight = self._weight(tied_weight)
        return vocab_parallel_fused_loss(
            x, weight, labels, vocab_size=self.vocab_size, tp=self.tp, rule=rule
        )

    def _weight(self, tied: Tensor | None) -> Tensor:
        """[v/tp, h]"""
        parameter = self.weight if tied is None else tied
        assert parameter is not None, "a tied head needs the embedding's weight"
        return local_weight(parameter)


class _HidePadding(torch.autograd.Function):
    """Sets the columns from ``first`` on to -inf in place: no copy of the largest tensor there is.

    Backward: identity, because the gradient there is zero already.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, first: int) -> Tensor:
        ctx.mark_dirty(logits)
        logits[..., first:] = float("-inf")
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
