"""Gemma 2: Gemma with norms after the blocks as well, softcaps, and a window on some layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import gemma, llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_LAYER = "model.layers.{}"
_SMALLEST_SCALE = 1e-9  # query_pre_attn_scalar is then above the largest size
MODULES: Mapping[str, str] = MappingProxyType(
    {
        **llama_like.MODULES,
        f"{_LAYER}.post_attention_layernorm": "layers.{}.attention_post_norm",
        f"{_LAYER}.pre_feedforward_layernorm": "layers.{}.mlp_norm",
        f"{_LAYER}.post_feedforward_layernorm": "layers.{}.mlp_post_norm",
    }
)
"""The tensor names of Gemma 2 and 3."""
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }
)
"""What Gemma 2 and 3 mean by a key that config.json leaves out."""


def read(fields: JsonFields, *, kinds: list[str], **options: Any) -> ModelConfig:
    """Reads what Gemma 2 and 3 share.

    Args:
        fields: config.json.
        kinds: the kinds of all layers if ``layer_types`` is missing.
        options: those of ``llama_like.read``.
    """
    fields.only("hidden_act", *llama_like.TANH_GELU)
    return gemma.read(
        fields,
        activation_key="hidden_activation",
        norm_placement="both",
        softmax_scale=fields.size("query_pre_attn_scalar") ** -0.5,
        final_logit_softcapping=read_softcap(fields, "final_logit_softcapping"),
        **llama_like.read_layer_windows(fields, kinds),
        **options,
    )


def write(model: ModelConfig, longest: int, **rope: Any) -> dict[str, Any]:
    """Writes what Gemma 2 and 3 share; the arguments are ``llama_like.write``'s."""
    scale = max(model.score_scale, _SMALLEST_SCALE)
    return {
        **gemma.write(model, longest, **rope),
        **llama_like.write_layer_windows(model),
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": model.attn_logit_softcapping,
        "final_logit_softcapping": model.final_logit_softcapping,
    }


def read_softcap(fields: JsonFields, key: str) -> float | None:
    """Reads a softcap, which null turns off."""
    cap = None if fields.get(key) is None else fields.number(key)
    if cap == 0:
        raise fields.wrong(key, "but must be greater than 0")
    return cap


def _read(fields: JsonFields) -> ModelConfig:
    why = "transformers does not read it in Gemma 2"
    fields.only("sliding_window_pattern", 2, why=why)
    fields.only("sliding_window_size", fields.get("sliding_window"), why=why)
    return read(
        fields,
        kinds=llama_like.every_nth_full(fields, 2),
        attn_logit_softcapping=read_softcap(fields, "attn_logit_softcapping"),
    )


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=_read,
    write=write,
    modules=MODULES,
    defaults={
        **DEFAULTS,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    heads_divide_hidden_size=True,
)
