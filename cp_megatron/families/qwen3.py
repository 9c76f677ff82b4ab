"""Qwen3: Llama with a norm on every query and key head, and a sliding window on some layers."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    fields.only("attention_bias", False)
    windows = llama_like.read_layer_windows(fields)
    return llama_like.read(fields, default_head_dim=128, qk_layernorm=True, **windows)


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        **llama_like.write_layer_windows(model),
        "attention_bias": False,
    },
    modules=llama_like.MODULES,
)
