"""Self-attention: projections over the tp axis around an attention over the cp axis.

The module holds no context parallelism; the layer hands q, k, v to the ``ContextParallel`` of its
forward. Heads stay grouped: keys and values have fewer heads than queries on the wire as well.

Shapes: b batch, s sequence of one context parallel rank, h hidden, n query heads, k kv heads,
d head dim.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from cp_megatron.config.schema import ModelConfig
from cp_megatron.errors import ConfigError
from cp_megatron.model.norm import LayerNorm, RMSNorm, make_norm
from cp_megatron.model.rope import Rotation
from cp_megatron.tensor_parallel import (
    ColumnParallelLinear,
    ReplicatedColumnLinear,
    RowParallelLinear,
    TensorParallel,
)


class SelfAttention(nn.Module):
    """The four projections of one layer, and the norms of its heads where the model has them.

    Raises:
        ConfigError: the query heads are not divisible by tp, or neither the kv heads by tp nor
            tp by the kv heads.
    """

    def __init__(self, config: ModelConfig, *, tp: TensorParallel) -> None:
        super().__init__()
        if config.num_attention_heads % tp.size:
            raise ConfigError(
                "--num-attention-heads",
                config.num_attention_heads,
                f"must be divisible by the tensor parallel size {tp.size}",
                str(-(-config.num_attention_heads // tp.size) * tp.size),
            )
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.query = ColumnParallelLinear(config.hidden_size, width, bias=config.has_qkv_bias)
        self.key = _key_value_linear(config, tp)
        self.value = _key_value_linear(config, tp)
        bias = not config.disable_bias_linear
        self.out = RowParallelLinear(width, config.hidden_size, bias=bias, tp=tp)
        self.query_norm = _head_norm(config, tp) if config.qk_layernorm else None
        self.key_norm = _head_norm(config, tp) if config.qk_layernorm else None

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """[b, s, h], entered into tensor parallelism -> q [b, s, n/tp, d], k and v [b, s, k/tp, d].

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
        """[b, s, n/tp, d] -> residual stream."""
        # [b, s, n, d] -> [b, s, n * d]
        return self.out(rearrange(attended, "b s n d -> b s (n d)"))


def _head_norm(config: ModelConfig, tp: TensorParallel) -> LayerNorm | RMSNorm:
    """One weight for all heads, of which every tp rank sees some: its gradient is a summand."""
    return make_norm(config, partial_gradient=tp.size > 1, width=config.head_dim)


def _key_value_linear(
    config: ModelConfig, tp: TensorParallel
) -> ColumnParallelLinear | ReplicatedColumnLinear:
    """Split by heads where there are enough; else whole on every rank, which computes one head."""
    heads, bias = config.num_kv_heads, config.has_qkv_bias
    width = heads * config.head_dim
    if heads % tp.size == 0:
        return ColumnParallelLinear(config.hidden_size, width, bias=bias)
    if tp.size % heads:
        raise ConfigError(
            "--num-query-groups",
            heads,
            f"must divide the tensor parallel size {tp.size} or be divisible by it",
            f"1, {tp.size}",
        )
    # Query heads of one group are neighbours, so rank r's all read kv head r // (tp / kv heads).
    head = tp.rank * heads // tp.size
    rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
    return ReplicatedColumnLinear(config.hidden_size, width, bias=bias, rows=rows)
