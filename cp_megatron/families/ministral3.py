"""Ministral 3: Mistral whose queries grow with their positions (a temperature of Llama 4)."""

from __future__ import annotations

from collections.abc import Mapping

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_LENGTH = "original_max_position_embeddings"
# Keys beside those of the rope type, as ``more`` of ``read_rope``.
_MORE: Mapping[str, str | None] = {
    "llama_4_scaling_beta": "query_temperature_beta",
    _LENGTH: _LENGTH,  # the temperature reads it with every rope type
    "max_position_embeddings": None,
}


def _read(fields: JsonFields) -> ModelConfig:
    if fields.get("layer_types") is not None:
        why = "transformers does not read it in Ministral 3"
        raise fields.unsupported("layer_types", "no layer_types", why)
    if not any(fields.inner(name).value for name in ("rope_parameters", "rope_scaling")):
        raise fields.wrong(
            "rope_parameters", "which transformers replaces by the rope of Ministral 3"
        )
    windows = llama_like.read_layer_windows(fields, llama_like.all_or_none(fields))
    return llama_like.read(fields, rope={"more": _MORE}, **windows)


MINISTRAL3 = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest, more=_MORE),
        "sliding_window": llama_like.window_width(model),
    },
    modules=llama_like.MODULES,
    defaults={
        "head_dim": 128,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
)
