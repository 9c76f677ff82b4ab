"""The mixers: the block of a layer in which tokens see one another. Today there is attention.

A mixer reads the normalized residual stream, and its output projection adds to the stream. A new
kind is another class with the methods of ``AttentionSpec``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from cp_megatron.config import ModelConfig
from cp_megatron.spec.parameter import BlockSpec
from cp_megatron.spec.pieces import LinearSpec, NormSpec
from cp_megatron.spec.sizes import ActivationSizes


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(BlockSpec):
    """Softmax attention with grouped heads.

    Attributes:
        query_norm, key_norm: normalize every query and key head before they are rotated.
        window: (left, right) as in ``Mask``; None is unlimited.
        rope: queries and keys are rotated by the model's rotary embedding.
    """

    query: LinearSpec
    key: LinearSpec
    value: LinearSpec
    out: LinearSpec
    query_norm: NormSpec | None
    key_norm: NormSpec | None
    heads: int
    kv_heads: int
    head_dim: int
    window: tuple[int, int] | None
    rope: bool

    @classmethod
    def of(cls, model: ModelConfig, *, layer: int = 0) -> AttentionSpec:
        """The attention of a layer, numbered from 0."""
        heads, kv_heads, width = model.num_attention_heads, model.num_kv_heads, model.head_dim
        project = partial(LinearSpec, inputs=model.hidden_size, bias=model.has_qkv_bias)
        keys = project(outputs=kv_heads * width, units=kv_heads, shares_units=True)
        norm = NormSpec.of(model, head=True) if model.qk_layernorm else None
        return cls(
            query=project(outputs=heads * width, units=heads),
            key=keys,
            value=keys,
            out=LinearSpec(
                inputs=heads * width,
                outputs=model.hidden_size,
                bias=not model.disable_bias_linear,
                split="row",
                units=heads,
            ),
            query_norm=norm,
            key_norm=norm,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width,
            window=model.layer_window(layer),
            rope=model.position_embedding_type == "rope",
        )

    def local_heads(self, tp: int) -> tuple[int, int]:
        """Query heads and key/value heads that one of ``tp`` tensor parallel ranks computes.

        With fewer key/value heads than ranks each rank computes one, shared with its neighbours.
        """
        return self.heads // tp, max(1, self.kv_heads // tp)

    def pair_channels(self) -> int:
        """Multiply-adds of one attended pair of a query and a key in one product; there are two,
        each computed once in forward and twice in backward."""
        return self.heads * self.head_dim

    def kept_operands(self, sizes: ActivationSizes) -> int:
        """Bytes of attention's inputs that backward needs and that recomputation frees: the
        normalized stream, what the norms of heads keep, and q, k and v."""
        heads, kv_heads = self.local_heads(sizes.tp)
        kept = sizes.stream_bytes(self.query.inputs)
        if self.query_norm is not None:
            kept += self.query_norm.kept_bytes(sizes.tokens * (heads + kv_heads), sizes)
        if sizes.head_exchange is None:  # otherwise those of other ranks' tokens are kept instead
            kept += sizes.tokens * (heads + 2 * kv_heads) * self.head_dim * sizes.element
        return kept

    def kept_results(self, sizes: ActivationSizes) -> int:
        """Bytes of the result and its log-sum-exp, which selective recomputation keeps too.

        If heads are exchanged for tokens, also the exchanged q, k, v and out, because they cannot
        be computed again without messages.
        """
        heads, _ = self.local_heads(sizes.tp)
        exchange, width = sizes.head_exchange, self.head_dim * sizes.element
        if exchange is None:
            return sizes.tokens * heads * (sizes.result_copies * width + sizes.exact)
        q0, q1 = exchange.query_heads[exchange.index]
        k0, k1 = exchange.kv_heads[exchange.index]
        tensors = 2 * (q1 - q0) + 2 * (k1 - k0)  # q, k, v and out
        exchanged = tensors * width + (q1 - q0) * sizes.exact
        return sizes.tokens * (heads * width + len(exchange.peers) * exchanged)

    def rotation_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the cosines and sines, which all layers share."""
        return sizes.row_tokens * self.head_dim * sizes.exact if self.rope else 0


def local_heads(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Query heads and key/value heads of one tensor parallel rank, from the configuration."""
    return AttentionSpec.of(model).local_heads(tp)
