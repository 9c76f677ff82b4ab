"""Qwen2: Llama with biases on queries, keys and values, and a sliding window on some layers."""

from __future__ import annotations

from cp_megatron.families import llama_like
from cp_megatron.families.family import Family

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=lambda fields: llama_like.read(
        fields, add_qkv_bias=True, **llama_like.read_optional_windows(fields)
    ),
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        **llama_like.write_optional_windows(model),
    },
    modules=llama_like.MODULES,
    defaults={"sliding_window": 4096},
)
