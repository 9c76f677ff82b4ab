"""SmolLM3: Llama in which some layers, by default every fourth, do not rotate queries and keys."""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.rope_fields import LAYER_KINDS


def _read(fields: JsonFields) -> ModelConfig:
    rotates = _read_rotated(fields)
    slides = fields.switch("use_sliding_window")
    if not slides:
        llama_like.refuse_unused_windows(fields)
    has_window = slides and fields.get("sliding_window") is not None
    kinds = [LAYER_KINDS[has_window and not rotated] for rotated in rotates]
    return llama_like.read(
        fields,
        no_rope_layers=tuple(n for n, rotated in enumerate(rotates) if not rotated) or None,
        **llama_like.read_layer_windows(fields, kinds),
        **llama_like.read_biases(fields),
    )


def _read_rotated(fields: JsonFields) -> list[bool]:
    """Returns whether each layer rotates; in spite of the key's name, 1 means that it does."""
    layers, interval = fields.size("num_hidden_layers"), fields.size("no_rope_layer_interval", 4)
    given: Any = fields.get("no_rope_layers")
    if given is None:
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(x not in (0, 1) for x in given):
        raise fields.wrong("no_rope_layers", f"but must be a list of {layers} entries 0 or 1")
    return [bool(x) for x in given[:layers]]


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        **llama_like.write_layer_windows(model),
        "use_sliding_window": llama_like.window_width(model) is not None,
        "no_rope_layers": [int(model.layer_rotates(n)) for n in range(model.num_layers)],
        "attention_bias": model.has_attention_output_bias,
        "mlp_bias": model.has_mlp_bias,
    },
    modules=llama_like.MODULES,
    defaults={"num_key_value_heads": 4, "rope_theta": 2000000.0, "tie_word_embeddings": True},
)
