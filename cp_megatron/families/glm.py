"""GLM and GLM-4: a share of each head is rotated, in pairs of neighbours; gate and up are fused.

GLM-4 also normalizes what attention and the MLP add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
_MODULES: Mapping[str, str] = {
    "model.embed_tokens": "embedding",
    "model.layers.{}.self_attn.q_proj": "layers.{}.attention.query",
    "model.layers.{}.self_attn.k_proj": "layers.{}.attention.key",
    "model.layers.{}.self_attn.v_proj": "layers.{}.attention.value",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attention.out",
    "model.layers.{}.mlp.gate_up_proj": "layers.{}.mlp.gate layers.{}.mlp.up",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down",
    "model.layers.{}.input_layernorm": "layers.{}.attention_norm",
    "model.layers.{}.post_self_attn_layernorm": "layers.{}.attention_post_norm",
    "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    "model.layers.{}.post_mlp_layernorm": "layers.{}.mlp_post_norm",
    "model.norm": "norm",
    "lm_head": "head",
}


def _read(fields: JsonFields, **flags: Any) -> ModelConfig:
    biases = fields.switch("attention_bias")
    return llama_like.read(fields, rotary_interleaved=True, add_qkv_bias=biases, **flags)


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    entries = llama_like.write(model, longest, partial=True)
    return {**entries, "attention_bias": model.has_qkv_bias}


GLM = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    read=_read,
    write=_write,
    modules=_MODULES,
    defaults=_DEFAULTS,
)
GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    read=lambda fields: _read(fields, norm_placement="both"),
    write=_write,
    modules=_MODULES,
    defaults=_DEFAULTS,
)
