"""Qwen3: Llama with a norm on every query and key head, and a sliding window on some layers."""

from __future__ import annotations

from cp_megatron.families import llama_like
from cp_megatron.families.family import Family

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=lambda fields: llama_like.read(
        fields,
        qk_layernorm=True,
        **llama_like.read_biases(fields, mlp=None),
        **llama_like.read_optional_windows(fields),
    ),
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        **llama_like.write_optional_windows(model),
        "attention_bias": model.has_attention_output_bias,
    },
    modules=llama_like.MODULES,
    defaults={"head_dim": 128, "sliding_window": 4096},
)
