"""Llama: biases in attention, in the MLP, in both or in none; every layer reads the whole past."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    fields.only("sliding_window", works="MistralForCausalLM", why="Llama has no window")
    return llama_like.read(fields, **llama_like.read_biases(fields))


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        "attention_bias": model.has_attention_output_bias,
        "mlp_bias": model.has_mlp_bias,
    },
    modules=llama_like.MODULES,
    heads_divide_hidden_size=True,
)
