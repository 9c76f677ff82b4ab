"""Self-attention: the projections over the tp axis around an attention over the cp axis.

The module does not know context parallelism: the layer hands q, k, v to the ``ContextParallel`` of
its forward. Heads stay grouped, so keys and values have fewer heads than queries in messages too.

Shapes: b batch, s sequence of one context parallel rank, h hidden, n query heads, k kv heads,
d head dim.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from cp_megatron.model.norm import Norm
from cp_megatron.model.rope import Rotation
from cp_megatron.spec import AttentionSpec
from cp_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel


class SelfAttention(nn.Module):
    """The four projections of one layer, and the norms of its heads if the model has them."""

    def __init__(self, spec: AttentionSpec, *, tp: TensorParallel) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.query = ColumnParallelLinear(spec.query, tp=tp)
        self.key = ColumnParallelLinear(spec.key, tp=tp)
        self.value = ColumnParallelLinear(spec.value, tp=tp)
        self.out = RowParallelLinear(spec.out, tp=tp)
        self.query_norm = None if spec.query_norm is None else Norm(spec.query_norm, tp=tp)
        self.key_norm = None if spec.key_norm is None else Norm(spec.key_norm, tp=tp)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """[b, s, h] -> q [b, s, n/tp, d], k and v [b, s, k/tp, d].

        With fewer kv heads than tp ranks every rank has one, shared with its neighbours.
        """
        # [b, s, n * d] -> [b, s, n, d], n the heads of this tp rank
        q, k, v = (
            rearrange(linear(x), "b s (n d) -> b s n d", d=self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotation.apply(q), rotation.apply(k)
        return q, k, v

    def output(self, attended: Tensor) -> Tensor:
        """[b, s, n/tp, d] -> this rank's summand of what is added to the residual stream."""
        # [b, s, n, d] -> [b, s, n * d]
        return self.out(rearrange(attended, "b s n d -> b s (n d)"))
