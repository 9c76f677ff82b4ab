"""Multi-head latent attention; ``spec/latent.py`` draws it.

Every tensor parallel rank computes all latents, and the keys and values of its own heads. These
are expanded by the attention over the cp axis, which may send latents to other ranks instead.

Shapes: b batch, s sequence of one context parallel rank, h hidden, n heads, p channels of a head
that are not rotated, r channels that are, e value head dim, l width of the latent.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.model.layer_memory import KeptMixer
from cp_megatron.model.norm import Norm
from cp_megatron.model.rope import Rotation
from cp_megatron.spec import LatentAttentionSpec
from cp_megatron.tensor_parallel import (
    ColumnParallelLinear,
    Entered,
    RowParallelLinear,
    TensorParallel,
    products,
)


class LatentAttention(nn.Module):
    """The projections of one layer, and the norms of its latents."""

    def __init__(self, spec: LatentAttentionSpec, *, tp: TensorParallel) -> None:
        super().__init__()
        self.spec, self.local_heads = spec, spec.local_heads(tp.size)
        down, norm = spec.query_down, spec.query_down_norm
        self.query_down = None if down is None else ColumnParallelLinear(down, tp=tp)
        self.query_down_norm = None if norm is None else Norm(norm, tp=tp)
        self.query = ColumnParallelLinear(spec.query, tp=tp)
        self.latent = ColumnParallelLinear(spec.latent, tp=tp)
        self.rotary_key = ColumnParallelLinear(spec.rotary_key, tp=tp)
        self.latent_norm = None if spec.latent_norm is None else Norm(spec.latent_norm, tp=tp)
        self.key_value = ColumnParallelLinear(spec.key_value, tp=tp)
        self.out = RowParallelLinear(spec.out, tp=tp)

    def prepare(self, cp: ContextParallel) -> None:
        """Lets ``cp`` plan this layer ahead of time."""
        cp.prepare(*self.local_heads, (self.spec.latent.outputs, self.spec.rotary_key.outputs))

    def project(self, x: Entered, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """[b, s, h] -> q [b, s, n/tp, p + r], latent [b, s, l], rotary key [b, s, r].

        The last r channels of q and the rotary key are rotated; the latent is normalized.
        """
        # Without latents of the queries their own projection reads x.
        first = self.query if self.query_down is None else self.query_down
        return self.arrange(rotation, *products(x, first, self.latent, self.rotary_key))

    def arrange(
        self, rotation: Rotation | None, queries: Tensor, latent: Tensor, rotary_key: Tensor
    ) -> tuple[Tensor, ...]:
        """The products of ``project`` -> its results."""
        if self.query_down_norm is not None:
            queries = self.query_down_norm(queries)
        if self.query_down is not None:
            queries = self.query(queries)
        # [b, s, n * (p + r)] -> [b, s, n, p + r]
        q = rearrange(queries, "b s (n d) -> b s n d", d=self.spec.head_dim)
        if self.latent_norm is not None:
            latent = self.latent_norm(latent)
        if rotation is not None:
            q = rotation.queries(q, start=q.shape[-1] - rotary_key.shape[-1])
            rotary_key = rotation.keys(rotary_key.unsqueeze(-2)).squeeze(-2)
        return q, latent, rotary_key

    def attend(
        self,
        q: Tensor,
        latent: Tensor,
        rotary_key: Tensor,
        *,
        cp: ContextParallel,
        dropout: Dropout | None,
        kept: KeptMixer | None,
    ) -> Tensor:
        """The results of ``project`` -> [b, s, n/tp, e].

        ``dropout`` is that of ``ContextParallel.latent_attention``; ``kept`` belongs to
        ``LayerMemory``.
        """
        weight = self.key_value.local("weight")
        return cp.latent_attention(
            q,
            latent,
            rotary_key,
            weight,
            self.spec.scale,
            dropout=dropout,
            kept=None if kept is None else kept.results,
        )

    def output(self, attended: Tensor) -> Tensor:
        """[b, s, n/tp, e] -> this rank's summand of what is added to the residual stream."""
        # [b, s, n, e] -> [b, s, n * e]
        return self.out(rearrange(attended, "b s n e -> b s (n e)"))
