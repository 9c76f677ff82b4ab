"""GLM-4.5: attention of Llama with a share of each head rotated, experts as in DeepSeek V3."""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import deepseek, llama_like, mixture
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    return llama_like.read(
        fields,
        add_qkv_bias=fields.switch("attention_bias"),
        qk_layernorm=fields.switch("use_qk_norm"),
        **deepseek.read_sigmoid_experts(fields),
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {
        **llama_like.write(model, longest, partial=True),
        "attention_bias": model.has_qkv_bias,
        "use_qk_norm": model.qk_layernorm,
        "num_nextn_predict_layers": 0,
        **deepseek.write_experts(model),
    }


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read=_read,
    write=_write,
    modules={
        **llama_like.MODULES,
        **mixture.ROUTER,
        **mixture.EXPERT_BIAS,
        **mixture.EXPERTS,
        **mixture.shared_names("shared_experts"),
    },
    other_names=mixture.STACKED,
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,
    },
    # transformers does not read the layer that predicts further tokens, either.
    buffers=r"model\.layers\.(\d+\.self_attn\.rotary_emb\.inv_freq|(46|92)\..*)",
)
