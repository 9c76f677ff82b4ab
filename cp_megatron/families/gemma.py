"""Gemma: Llama with a GELU gate, embeddings times the root of their width, and norms with 1 + w."""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def read(fields: JsonFields, **options: Any) -> ModelConfig:
    """Reads what all generations of Gemma share; ``options`` are those of ``llama_like.read``."""
    why = "a token then reads those that follow it"
    fields.only("use_bidirectional_attention", False, why=why)
    shared = {
        "activations": llama_like.TANH_GELU,
        "swiglu": False,
        "geglu": True,
        "apply_layernorm_1p": True,
        "embedding_multiplier": fields.size("hidden_size") ** 0.5,
        **llama_like.read_biases(fields, mlp=None),
    }
    return llama_like.read(fields, **{**shared, **options})


def write(model: ModelConfig, longest: int, **rope: Any) -> dict[str, Any]:
    """Writes what all generations of Gemma share; the arguments are ``llama_like.write``'s."""
    activation = llama_like.TANH_GELU[0]
    return {
        **llama_like.write(model, longest, **rope),
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": model.has_attention_output_bias,
        "use_bidirectional_attention": False,
    }


def _read(fields: JsonFields) -> ModelConfig:
    fields.only("hidden_activation", *llama_like.TANH_GELU)
    # The first folders say gelu; transformers takes it for GELU with tanh.
    return read(fields, activations=("gelu", *llama_like.TANH_GELU))


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read=_read,
    write=write,
    modules=llama_like.MODULES,
    defaults={
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
)
