"""Llama: all linear layers have biases or none has; every layer attends to the whole past."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    fields.only("sliding_window", works="MistralForCausalLM", why="Llama has no window")
    attention, mlp = (fields.switch(name) for name in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        why = "mlp_bias must be the same, because all linear layers have biases or none has"
        raise fields.unsupported("attention_bias", str(mlp).lower(), why)
    return llama_like.read(fields, disable_bias_linear=not attention)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        "attention_bias": not model.disable_bias_linear,
        "mlp_bias": not model.disable_bias_linear,
    },
    modules=llama_like.MODULES,
    heads_divide_hidden_size=True,
)
