"""One layer of the transformer: norm, mixer, residual, norm, MLP, residual.

Every line computes with the tokens that one rank holds. What crosses ranks is visible: ``tp.enter``
and ``tp.leave`` around each block (tensor and sequence parallelism) and ``cp.attention`` (context
parallelism). What is kept for backward is decided by ``LayerMemory``, around the same functions.

Shapes: b batch, s sequence of one context parallel rank, h hidden. The residual stream is
[b, s, h]; with sequence parallelism [b, s/tp, h].
"""

from __future__ import annotations

from torch import Tensor, nn

from cp_megatron.context_parallel import ContextParallel, KeptAttention
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.model.layer_memory import LayerMemory, Pass
from cp_megatron.model.mlp import MLP
from cp_megatron.model.norm import Norm
from cp_megatron.model.rope import Rotation
from cp_megatron.model.self_attention import SelfAttention
from cp_megatron.spec import LayerSpec
from cp_megatron.tensor_parallel import LocalWeights


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added."""

    def __init__(self, spec: LayerSpec, *, memory: LayerMemory) -> None:
        super().__init__()
        self.memory, self.tp = memory, memory.tp
        self.attention_norm = Norm(spec.attention_norm, tp=self.tp)
        self.attention = SelfAttention(spec.attention, tp=self.tp)
        self.mlp_norm = Norm(spec.mlp_norm, tp=self.tp)
        self.mlp = MLP(spec.mlp, tp=self.tp)
        self.dropout = nn.Dropout(spec.dropout)
        self.mlp_weights = LocalWeights(self.mlp_norm, self.mlp)

    def forward(
        self, x: Tensor, rotation: Rotation | None, cp: ContextParallel, dropout: Dropout | None
    ) -> Tensor:
        """Residual stream -> residual stream; ``dropout`` is that of the attention weights."""
        return self.memory.layer(self._layer, x, rotation, cp, dropout)

    def _layer(
        self,
        x: Tensor,
        rotation: Rotation | None,
        cp: ContextParallel,
        dropout: Dropout | None,
        layer_pass: Pass,
    ) -> Tensor:
        attended = self.memory.mixer(self._attend, x, rotation, cp, dropout)
        added = self.tp.leave(self.attention.output(attended), self.attention.out.local_bias())
        x = x + self.dropout(added)
        added = self.memory.mlp(self._feed_forward, x, self.mlp_weights, layer_pass)
        return x + self.dropout(added)

    def _attend(
        self,
        x: Tensor,
        rotation: Rotation | None,
        cp: ContextParallel,
        dropout: Dropout | None,
        kept: KeptAttention | None,
    ) -> Tensor:
        """Residual stream -> [b, s, heads/tp, head dim]."""
        h = self.attention_norm(x)
        q, k, v = self.memory.entered(self.attention.project, self.tp.enter(h), rotation, rows=h)
        return cp.attention(q, k, v, dropout=dropout, kept=kept)

    def _feed_forward(self, x: Tensor, gradient_only: bool) -> Tensor:
        """Residual stream -> what the MLP adds to it."""
        h = self.mlp_norm(x)
        h = self.memory.entered(self.mlp, self.tp.enter(h), gradient_only, rows=h)
        return self.tp.leave(h, self.mlp.down.local_bias(), gradient_only=gradient_only)
