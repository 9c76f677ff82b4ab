"""Gated DeltaNet; ``spec/linear_attention.py`` draws it.

Each tensor parallel rank computes some of the heads. The convolution and the recurrence over the
cp axis fetch a few tokens and states of other ranks.

Shapes: b batch, s sequence of one context parallel rank, h hidden, n value heads, k key heads,
d key dim, e value dim, w width of the convolution; c = (2 k d + n e) / tp channels that are
convolved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.gated import GatedFunction, gated
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.model.layer_memory import KeptMixer
from cp_megatron.model.norm import Norm
from cp_megatron.model.rope import Rotation
from cp_megatron.spec import ConvolutionSpec, LinearAttentionSpec
from cp_megatron.tensor_parallel import (
    ColumnParallelLinear,
    Entered,
    RowParallelLinear,
    SpecifiedModule,
    TensorParallel,
    products,
    shared_unit,
)

LENGTH_EPSILON = 1e-6
"""Is added to the squared length of queries and keys, as in Qwen3-Next."""


class ConvolutionWeight(SpecifiedModule):
    """The weight of a convolution per channel; if tp ranks share heads, each reads one of them."""

    def __init__(self, spec: ConvolutionSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.rows = shared_unit(self.specs["weight"], tp)

    def forward(self) -> Tensor:
        """The rows of this rank's channels, [.., w]."""
        weight = self.local("weight").squeeze(1)  # [.., 1, w] -> [.., w]
        return weight if self.rows is None else weight[self.rows]


class Decay(SpecifiedModule):
    """The logarithm of the decay, -exp(A_log) softplus(x + dt_bias).

    Its parameters and its result are float32 (float64 for float64) whatever the activations are: a
    rounded rate of decay is multiplied by the length of the memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, n/tp] -> [b, s, n/tp]."""
        rate = self.local("A_log"), self.local("dt_bias")
        exact = accumulation_dtype(x.dtype)
        log, bias = (y.to(exact) for y in rate)
        return -log.exp() * F.softplus(x.to(exact) + bias)


class GatedDeltaNet(nn.Module):
    """The projections, convolutions, decay and norm of one layer around its recurrence."""

    def __init__(self, spec: LinearAttentionSpec, *, tp: TensorParallel) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.conv_width = spec.query_conv.width
        self.heads, self.key_heads = spec.local_heads(tp.size)
        self.query = ColumnParallelLinear(spec.query, tp=tp)
        self.key = ColumnParallelLinear(spec.key, tp=tp)
        self.value = ColumnParallelLinear(spec.value, tp=tp)
        self.gate = ColumnParallelLinear(spec.gate, tp=tp)
        self.rate = ColumnParallelLinear(spec.rate, tp=tp)
        self.decay_input = ColumnParallelLinear(spec.decay_input, tp=tp)
        self.query_conv = ConvolutionWeight(spec.query_conv, tp=tp)
        self.key_conv = ConvolutionWeight(spec.key_conv, tp=tp)
        self.value_conv = ConvolutionWeight(spec.value_conv, tp=tp)
        self.decay = Decay(spec.decay, tp=tp)
        self.norm = Norm(spec.norm, tp=tp)
        self.out = RowParallelLinear(spec.out, tp=tp)

    def prepare(self, cp: ContextParallel) -> None:
        """Lets ``cp`` plan this layer ahead of time."""
        cp.prepare_recurrence(self.heads, self.conv_width)

    def project(self, x: Entered, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """[b, s, h] -> what is convolved [b, s, c], gate [b, s, n/tp * e], and rate and input of
        the decay [b, s, n/tp]."""
        assert rotation is None, "a recurrence needs no positions"
        layers = (self.query, self.key, self.value, self.gate, self.rate, self.decay_input)
        q, k, v, *others = products(x, *layers)
        return torch.cat((q, k, v), dim=-1), *others

    def attend(
        self,
        mixed: Tensor,
        gate: Tensor,
        rate: Tensor,
        decay_input: Tensor,
        *,
        cp: ContextParallel,
        dropout: Dropout | None,
        kept: KeptMixer | None,
    ) -> Tensor:
        """The results of ``project`` -> [b, s, n/tp, e].

        ``kept`` belongs to ``LayerMemory``. ``dropout`` is that of attention weights, which a
        recurrence does not have.
        """
        weights = torch.cat((self.query_conv(), self.key_conv(), self.value_conv()))
        halo = None if kept is None else kept.halo
        mixed = F.silu(cp.short_conv(mixed, weights, kept=halo))
        keys = self.key_heads * self.head_dim
        q, k, v = mixed.split((keys, keys, mixed.shape[-1] - 2 * keys), dim=-1)
        # [b, s, k * d] -> [b, s, k, d], and [b, s, n * e] -> [b, s, n, e]
        q, k = (_normalized(rearrange(y, "b s (k d) -> b s k d", k=self.key_heads)) for y in (q, k))
        v, z = (rearrange(y, "b s (n e) -> b s n e", n=self.heads) for y in (v, gate))
        g = self.decay(decay_input)
        states = None if kept is None else kept.results or kept.states
        out = cp.linear_attention(q, k, v, g, rate.sigmoid(), kept=states)
        return gated(z, self.norm(out), GatedFunction("silu"))

    def output(self, attended: Tensor) -> Tensor:
        """[b, s, n/tp, e] -> this rank's summand of what is added to the residual stream."""
        # [b, s, n, e] -> [b, s, n * e]
        return self.out(rearrange(attended, "b s n e -> b s (n e)"))


def _normalized(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + epsilon) for each head, [b, s, k, d] -> [b, s, k, d].

    This is RMSNorm divided by sqrt(d), which torch computes in the type of sums.
    """
    width = x.shape[-1]
    return F.rms_norm(x, (width,), eps=LENGTH_EPSILON / width) * width**-0.5
