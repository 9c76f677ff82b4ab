"""The vocabulary split over the tp ranks, as input (embedding) and as output (head).

The vocabulary is padded to a multiple that does not depend on the tp size, so that any grid loads
any checkpoint. Padding rows start at zero, get a zero gradient and are never predicted.

Shapes: b batch, s sequence of one context parallel rank, h hidden, v padded vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cp_megatron.kernels.logit_transform import LogitTransform, rounded
from cp_megatron.spec import EmbeddingSpec, HeadSpec
from cp_megatron.tensor_parallel.fused_loss import LossRule, vocab_parallel_fused_loss
from cp_megatron.tensor_parallel.group import TensorParallel
from cp_megatron.tensor_parallel.placement import SpecifiedModule, local_weight


class VocabParallelEmbedding(SpecifiedModule):
    """The rows of the table are split: each rank looks up the ids it has, and the sum is taken.

    The multiplier is rounded to the type of the activations before it multiplies the vectors, as in
    Gemma.
    """

    weight: nn.Parameter

    def __init__(self, spec: EmbeddingSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.tp = tp
        self.multiplier = spec.multiplier

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, s] int64 in [0, vocabulary) -> residual stream [b, s, h] (or [b, s/tp, h])."""
        vectors = self._look_up(tokens)
        if self.multiplier == 1.0:
            return vectors
        return vectors * rounded(self.multiplier, vectors.dtype)

    def _look_up(self, tokens: Tensor) -> Tensor:
        weight = self.local("weight")  # [v/tp, h]
        if self.tp.size == 1:
            return F.embedding(tokens, weight)
        local = tokens - self.tp.rank * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        vectors = F.embedding(local.masked_fill(elsewhere, 0), weight)
        return self.tp.leave(vectors.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class VocabParallelHead(SpecifiedModule):
    """Logits of this rank's part of the vocabulary; those of padding are -inf.

    ``LogitTransform`` describes the multiplier and the softcap.

    With tied weights it has no parameter, and its methods are given the embedding's.
    """

    def __init__(self, spec: HeadSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.tp = tp
        self.vocab_size = spec.vocab_size
        self.transform = LogitTransform(multiplier=spec.multiplier, softcap=spec.softcap)

    def forward(
        self,
        x: Tensor,
        tied_weight: Tensor | None = None,
        labels: Tensor | None = None,
        rule: LossRule | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Residual stream -> logits [b, s, v/tp], or with labels their ``losses``."""
        if labels is not None:
            return self.losses(x, labels, rule or LossRule(), tied_weight)
        weight = self._weight(tied_weight)
        logits = self.transform.logits(F.linear(self.tp.enter(x), weight))
        first_padding = self.vocab_size - self.tp.rank * weight.shape[0]
        if first_padding < weight.shape[0]:
            # In place, because logits are too large to be copied.
            logits[..., max(first_padding, 0) :] = float("-inf")
        return logits

    def losses(
        self, x: Tensor, labels: Tensor, rule: LossRule, tied_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Residual stream and labels [b, s] -> their loss; see ``vocab_parallel_fused_loss``."""
        weight = self._weight(tied_weight)
        return vocab_parallel_fused_loss(
            x,
            weight,
            labels,
            vocab_size=self.vocab_size,
            tp=self.tp,
            rule=rule,
            transform=self.transform,
        )

    def _weight(self, tied: Tensor | None) -> Tensor:
        """[v/tp, h]"""
        return self.local("weight") if tied is None else local_weight(tied)
