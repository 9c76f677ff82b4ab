"""Ministral: Mistral with a sliding window on the layers that layer_types names."""

from __future__ import annotations

from cp_megatron.families import llama_like, mistral
from cp_megatron.families.family import Family

MINISTRAL = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    read=mistral.read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        **llama_like.write_layer_windows(model),
    },
    modules=llama_like.MODULES,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
