"""Multi-head latent attention of DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

Keys and values of all heads are computed from one latent vector per token. Of each key, the first
channels come from the latent; the others are rotated by position, and all heads share them::

    x -> latent      -> norm -> key_value -> per head: channels of the key, the value
    x -> rotary_key  -> rotated           -> the other channels of the keys of all heads
    x -> query_down  -> norm -> query     -> queries, whose last channels are rotated
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from cp_megatron.config import ModelConfig
from cp_megatron.spec.mixer import MixerSpec
from cp_megatron.spec.pieces import LinearSpec, NormSpec
from cp_megatron.spec.sizes import ActivationSizes


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec(MixerSpec):
    """Attention with latent keys and values.

    Every tensor parallel rank computes all latents and some of the heads.

    Attributes:
        query_down, query_down_norm: compute the latent of the queries; None: ``query`` reads the
            residual stream.
        query: computes the queries of all heads.
        latent, latent_norm: compute the latent of keys and values.
        rotary_key: computes the rotated channels of the keys.
        key_value: computes, per head, the other channels of the keys, then the values.
        out: adds the values that the heads attended to the residual stream.

    A norm is None in models without ``qk_layernorm``.
    """

    query_down: LinearSpec | None
    query_down_norm: NormSpec | None
    query: LinearSpec
    latent: LinearSpec
    rotary_key: LinearSpec
    latent_norm: NormSpec | None
    key_value: LinearSpec
    out: LinearSpec

    @classmethod
    def of(cls, model: ModelConfig, *, layer: int = 0) -> LatentAttentionSpec:
        """The attention of a layer, numbered from 0."""
        hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.q_lora_rank
        down = partial(
            LinearSpec, inputs=hidden, bias=model.has_qkv_bias, units=1, shares_units=True
        )
        norm = None
        if model.qk_layernorm:
            norm = NormSpec.of(model, width=model.kv_lora_rank, used_on="heads")
            norm = replace(norm, epsilon=model.latent_epsilon)
        up = partial(LinearSpec, bias=False, units=heads)
        return cls(
            query_down=down(outputs=rank) if rank else None,
            query_down_norm=replace(norm, width=rank) if norm and rank else None,
            query=up(inputs=rank or hidden, outputs=heads * model.head_dim),
            latent=down(outputs=model.kv_lora_rank),
            rotary_key=down(outputs=model.qk_pos_emb_head_dim),
            latent_norm=norm,
            key_value=up(
                inputs=model.kv_lora_rank, outputs=heads * (model.qk_head_dim + model.value_dim)
            ),
            out=LinearSpec(
                inputs=heads * model.value_dim,
                outputs=hidden,
                bias=model.has_attention_output_bias,
                split="row",
                units=heads,
            ),
            **cls.shared_fields(model, layer=layer),
        )

    def operand_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of q, k and v, or of q and the rotary key if latents are sent."""
        if not sizes.sends_latents:
            return super().operand_bytes(sizes)
        channels = self.local_heads(sizes.tp).heads * self.head_dim + self.rotary_key.outputs
        return sizes.tokens * channels * sizes.element

    def kept_operands(self, sizes: ActivationSizes) -> int:
        """Bytes of attention's inputs that backward needs and that recomputation frees.

        These are the normalized stream, the latents and what their norms keep, and q, k and v.
        """
        kept = sizes.stream_bytes(self.latent.inputs) + self.operand_bytes(sizes)
        latents = [(self.latent, self.latent_norm)]
        if self.query_down is not None:
            latents.append((self.query_down, self.query_down_norm))
        for down, norm in latents:
            kept += sizes.tokens * down.outputs * sizes.element
            kept += 0 if norm is None else norm.kept_bytes(sizes.tokens, sizes)
        return kept
