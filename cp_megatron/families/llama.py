"""Llama: all linear layers have biases or none has; every layer attends to the whole past."""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.llama_like import LLAMA_MODULES, read_llama_like, write_llama_like


def _read(fields: JsonFields) -> ModelConfig:
    fields.only("sliding_window", works="MistralForCausalLM", why="Llama has no window")
    attention, mlp = (fields.switch(name, False) for name in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        why = "mlp_bias must be the same, because all linear layers have biases or none"
        raise fields.unsupported("attention_bias", str(mlp).lower(), why)
    return read_llama_like(fields, disable_bias_linear=not attention)


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    biases = not model.disable_bias_linear
    return {**write_llama_like(model, longest), "attention_bias": biases, "mlp_bias": biases}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    modules=LLAMA_MODULES,
    heads_divide_hidden_size=True,
)
