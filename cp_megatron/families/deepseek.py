"""DeepSeek V2 and V3 without experts: latent attention (``spec/latent.py``) and dense layers.

``first_k_dense_replace`` is the number of dense layers before those with experts. It must be the
number of all layers or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_DENSE = "first_k_dense_replace"
_LATENT_EPSILON = 1e-6  # transformers' norms of latents do not read rms_norm_eps
_DEFAULTS: Mapping[str, Any] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
# Keys that have no effect in layers without experts.
_EXPERTS = (
    *("moe_intermediate_size", "moe_layer_freq", "n_routed_experts", "n_shared_experts"),
    *("norm_topk_prob", "num_experts_per_tok", "output_router_logits", "routed_scaling_factor"),
)


def _read(fields: JsonFields, **flags: Any) -> ModelConfig:
    layers, heads = fields.size("num_hidden_layers"), fields.size("num_attention_heads")
    dense = fields.get(_DENSE)
    if type(dense) is not int or dense < layers:
        why = "the layers from this one on are a mixture of experts"
        raise fields.unsupported(_DENSE, f"at least {layers}, the number of layers", why)
    for name in _EXPERTS:
        fields.get(name)
    unrotated, rotated = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    fields.only("head_dim", rotated, why="transformers stores qk_rope_head_dim there")
    fields.only("qk_head_dim", unrotated + rotated)
    fields.only("num_key_value_heads", heads, why="every query head has keys of its own")
    if rotated % 2:
        raise fields.wrong("qk_rope_head_dim", "but must be even, because rope rotates pairs")
    has_query_latent = fields.get("q_lora_rank") is not None
    return llama_like.read(
        fields,
        multi_latent_attention=True,
        q_lora_rank=fields.size("q_lora_rank") if has_query_latent else None,
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_head_dim=unrotated,
        qk_pos_emb_head_dim=rotated,
        v_head_dim=fields.size("v_head_dim"),
        kv_channels=None,
        qk_layernorm=True,
        latent_norm_epsilon=_LATENT_EPSILON,
        **flags,
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {
        **llama_like.write(model, longest),
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_head_dim,
        "qk_rope_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.value_dim,
        "head_dim": model.qk_pos_emb_head_dim,
        "attention_bias": model.has_qkv_bias,
        _DENSE: model.num_layers,
    }


def _modules(model: ModelConfig) -> dict[str, str]:
    attention, ours = "model.layers.{}.self_attn", "layers.{}.attention"
    modules = {
        theirs: name
        for theirs, name in llama_like.MODULES.items()
        if not theirs.startswith(attention)
    }
    return modules | {
        f"{attention}.q_a_proj": f"{ours}.query_down",
        f"{attention}.q_a_layernorm": f"{ours}.query_down_norm",
        f"{attention}.{'q_b_proj' if model.q_lora_rank else 'q_proj'}": f"{ours}.query",
        f"{attention}.kv_a_proj_with_mqa": f"{ours}.latent {ours}.rotary_key",
        f"{attention}.kv_a_layernorm": f"{ours}.latent_norm",
        f"{attention}.kv_b_proj": f"{ours}.key_value",
        f"{attention}.o_proj": f"{ours}.out",
    }


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=lambda fields: _read(
        fields,
        rotary_interleaved=fields.switch("rope_interleave", True),
        **llama_like.read_biases(fields, mlp=None),
    ),
    write=lambda model, longest: {
        **_write(model, longest),
        "rope_interleave": model.rotary_interleaved,
        "num_nextn_predict_layers": 0,
    },
    modules=_modules,
    defaults={**_DEFAULTS, _DENSE: 3},
)
DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read=lambda fields: _read(fields, rotary_interleaved=True, **llama_like.read_biases(fields)),
    write=lambda model, longest: {**_write(model, longest), "mlp_bias": model.has_mlp_bias},
    modules=_modules,
    defaults={**_DEFAULTS, _DENSE: 0},
    heads_divide_hidden_size=True,
)
