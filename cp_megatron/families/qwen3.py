"""Qwen3: Llama with a norm on every query and key head, and a sliding window on some layers."""

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
    fields.only("attention_bias", False)
    windows = read_layer_windows(fields)
    return read_llama_like(fields, default_head_dim=128, qk_layernorm=True, **windows)


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    windows = write_layer_windows(model)
    return {**write_llama_like(model, longest), **windows, "attention_bias": False}


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read,
    write=_write,
    modules=LLAMA_MODULES,
)
