"""EXAONE 4: Llama with norms after the blocks and a norm on every query and key head.

Models with a window have it on three of four layers, and rotate queries and keys in those only.
"""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.olmo2 import MODULES


def _read(fields: JsonFields) -> ModelConfig:
    layers, width = range(fields.size("num_hidden_layers")), fields.get("sliding_window")
    kinds = ["full_attention"] * len(layers)
    fields.get("sliding_window_pattern")  # it has no effect beside layer_types
    if width is not None and fields.get("layer_types") is None:
        kinds = llama_like.every_nth_full(fields, 4)
    windows = llama_like.read_layer_windows(fields, kinds)
    # All layers rotate if sliding_window is null; otherwise only those that have the window do.
    rotated = layers if width is None or windows else ()
    rotated = windows.get("window_layers") or rotated
    unrotated = tuple(layer for layer in layers if layer not in rotated)
    return llama_like.read(
        fields,
        norm_placement="post",
        qk_layernorm=True,
        no_rope_layers=unrotated or None,
        **windows,
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    entries = llama_like.write(model, longest) | llama_like.write_layer_windows(model)
    if not model.no_rope_layers and llama_like.window_width(model) is None:
        entries["sliding_window"] = None
    return entries


EXAONE4 = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    read=_read,
    write=_write,
    modules=MODULES,
    defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096},
)
