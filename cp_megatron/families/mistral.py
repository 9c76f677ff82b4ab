"""Mistral: Llama without biases, and with a sliding window on all layers."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def read(fields: JsonFields) -> ModelConfig:
    """Reads Mistral or Ministral, which a Mistral with layer_types is for transformers."""
    windows = llama_like.read_layer_windows(fields, llama_like.all_or_none(fields))
    return llama_like.read(fields, **windows)


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        "sliding_window": llama_like.window_width(model),
    },
    modules=llama_like.MODULES,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
