"""Mistral: Llama without biases, and with one sliding window on all layers."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    kinds = fields.value.get("layer_types")
    everywhere = isinstance(kinds, list) and all(kind == "sliding_attention" for kind in kinds)
    if kinds is not None and not everywhere:
        why = "transformers does not read it in Mistral"
        raise fields.unsupported("layer_types", "no layer_types", why)
    width = fields.size("sliding_window", 4096)
    # A missing key means this default, unlike null, which means no window.
    window = None if fields.value.get("sliding_window", width) is None else (width - 1, 0)
    return llama_like.read(fields, default_kv_heads=8, window_size=window)


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        "sliding_window": llama_like.window_width(model),
    },
    modules=llama_like.MODULES,
)
