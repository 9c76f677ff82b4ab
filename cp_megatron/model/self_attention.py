"""Self-attention: the projections over the tp axis around an attention over the cp axis.

Heads stay grouped, so keys and values have fewer heads than queries in messages too.

Shapes: b batch, s sequence of one context parallel rank, h hidden, n query heads, k kv heads,
d head dim, e value head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from einops import rearrange
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.model.layer_memory import KeptMixer
from cp_megatron.model.norm import Norm
from cp_megatron.model.rope import Rotation
from cp_megatron.spec import AttentionSpec
from cp_megatron.tensor_parallel import (
    AllHeadsNorm,
    ColumnParallelLinear,
    EachHeadNorm,
    Entered,
    RowParallelLinear,
    SpecifiedModule,
    TensorParallel,
    products,
)

NORMS: Mapping[str, type[Norm | EachHeadNorm | AllHeadsNorm]] = MappingProxyType(
    {"head": Norm, "each_head": EachHeadNorm, "all_heads": AllHeadsNorm}
)
"""The modules of the norms of heads, by their scope (``HeadNormSpec``)."""


class SelfAttention(SpecifiedModule):
    """The projections of one layer, the norms of its heads and its attention sinks."""

    def __init__(self, spec: AttentionSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.spec, self.local_heads = spec, spec.local_heads(tp.size)
        self.query = ColumnParallelLinear(spec.query, tp=tp)
        self.key = ColumnParallelLinear(spec.key, tp=tp)
        self.value = ColumnParallelLinear(spec.value, tp=tp)
        self.gate = None if spec.gate is None else ColumnParallelLinear(spec.gate, tp=tp)
        self.out = RowParallelLinear(spec.out, tp=tp)
        self.query_norm, self.key_norm = (
            None if norm is None else NORMS[norm.scope](norm, tp=tp)
            for norm in (spec.query_norm, spec.key_norm)
        )

    def prepare(self, cp: ContextParallel) -> None:
        """Lets ``cp`` plan this layer ahead of time."""
        cp.prepare(*self.local_heads)

    def project(self, x: Entered, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """[b, s, h] -> q [b, s, n/tp, d], k [b, s, k/tp, d], v [b, s, k/tp, e] and, if there is
        one, the gate [b, s, n/tp, e].

        With fewer kv heads than tp ranks every rank has one, shared with its neighbours.
        """
        layers = (self.query, self.key, self.value)
        gates = () if self.gate is None else (self.gate,)
        return self.arrange(rotation, *products(x, *layers, *gates))

    def arrange(self, rotation: Rotation | None, *flat: Tensor) -> tuple[Tensor, ...]:
        """The products of ``project`` -> its results."""
        width, v_width = self.spec.head_dim, self.spec.v_head_dim
        # [b, s, n * d] -> [b, s, n, d], n the heads of this tp rank
        q, k, v, *gate = (
            rearrange(y, "b s (n d) -> b s n d", d=d)
            for y, d in zip(flat, (width, width, v_width, v_width))
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotation.queries(q), rotation.keys(k)
        return q, k, v, *gate

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None = None,
        *,
        cp: ContextParallel,
        dropout: Dropout | None,
        kept: KeptMixer | None,
    ) -> Tensor:
        """The results of ``project`` -> [b, s, n/tp, e].

        ``dropout`` is that of ``ContextParallel.attention``; ``kept`` belongs to ``LayerMemory``.
        """
        attended = cp.attention(
            q,
            k,
            v,
            self.spec.scale,
            sinks=self._sinks(q),
            softcap=self.spec.softcap,
            dropout=dropout,
            kept=None if kept is None else kept.results,
        )
        return attended if gate is None else attended * gate.sigmoid()

    def _sinks(self, q: Tensor) -> Tensor | None:
        """[n/tp], the sinks of this rank's heads; None without sinks.

        A softmax of the type ``off-by-one`` has a sink of 0 for every head.
        """
        if self.spec.sinks == "learnable":
            return self.local("sinks")
        return None if self.spec.sinks == "vanilla" else q.new_zeros(q.shape[2])

    def output(self, attended: Tensor) -> Tensor:
        """[b, s, n/tp, e] -> this rank's summand of what is added to the residual stream."""
        # [b, s, n, e] -> [b, s, n * e]
        return self.out(rearrange(attended, "b s n e -> b s (n e)"))
