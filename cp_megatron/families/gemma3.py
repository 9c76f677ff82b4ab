"""Gemma 3 without images: Gemma 2 with norms of heads and a second rotary base for windows."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import gemma2, llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    why = "transformers does not apply it in Gemma 3"
    fields.only("attn_logit_softcapping", why=why, works="null")
    return gemma2.read(
        fields,
        kinds=llama_like.every_nth_full(fields, 6),
        qk_layernorm=True,
        rope={"window_base": 10_000.0},
    )


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **gemma2.write(model, longest, by_layer=True),
        "attn_logit_softcapping": None,
    },
    modules=gemma2.MODULES,
    defaults={
        **gemma2.DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
    },
    heads_divide_hidden_size=True,
)
