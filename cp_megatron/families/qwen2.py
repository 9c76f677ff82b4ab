"""Qwen2: Llama with biases on queries, keys and values, and a sliding window on some layers."""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.llama_like import (
    LLAMA_MODULES,
    read_layer_windows,
    read_llama_like,
    write_layer_windows,
    write_llama_like,
)


def _read(fields: JsonFields) -> ModelConfig:
    return read_llama_like(fields, add_qkv_bias=True, **read_layer_windows(fields))


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {**write_llama_like(model, longest), **write_layer_windows(model)}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=_read,
    write=_write,
    modules=LLAMA_MODULES,
)
