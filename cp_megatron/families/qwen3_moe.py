"""Qwen3-MoE: Qwen3 with experts in some layers, and a sliding window on all layers or on none."""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like, mixture
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    fields.get("max_window_layers")  # transformers does not read it in Qwen3-MoE
    windows: dict[str, Any] = {}
    if fields.switch("use_sliding_window"):
        windows = llama_like.read_layer_windows(fields, llama_like.all_or_none(fields))
    else:
        fields.get("sliding_window")
    return llama_like.read(
        fields,
        qk_layernorm=True,
        **llama_like.read_biases(fields, mlp=None),
        **windows,
        **mixture.read_experts(
            fields,
            mixture.sparse_layers(fields),
            count=("num_experts", "num_local_experts"),
            unread=("norm_topk_prob",),
            moe_router_pre_softmax=not fields.switch("norm_topk_prob"),
        ),
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {
        **llama_like.write(model, longest),
        "attention_bias": model.has_attention_output_bias,
        "use_sliding_window": model.window_size is not None,
        "sliding_window": llama_like.window_width(model),
        **mixture.write_experts(model, count="num_experts"),
        **mixture.write_sparse_layers(model),
        "norm_topk_prob": not model.moe_router_pre_softmax,
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read,
    write=_write,
    modules={**llama_like.MODULES, **mixture.ROUTER, **mixture.EXPERTS},
    other_names=mixture.STACKED,
    defaults={
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
)
