"""OLMo 2 and 3: Llama with norms after the blocks and norms of all heads of a token together.

OLMo 3 has a window on three of four layers, and a rope type that changes the others only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_BASE = 500000.0
_LOCAL_BASE = "rope_local_base_freq"  # of Gemma 3; OLMo 3 does not read it

MODULES: Mapping[str, str] = {
    **llama_like.MODULES,
    "model.layers.{}.post_attention_layernorm": "layers.{}.attention_post_norm",
    "model.layers.{}.post_feedforward_layernorm": "layers.{}.mlp_post_norm",
}
"""The tensor names of Llama, with norms after the blocks."""


def _read(fields: JsonFields, **flags: Any) -> ModelConfig:
    return llama_like.read(
        fields,
        norm_placement="post",
        qk_layernorm=True,
        qk_norm_scope="all_heads",
        **llama_like.read_biases(fields, mlp=None),
        **flags,
    )


def _read_olmo3(fields: JsonFields) -> ModelConfig:
    fields.only(_LOCAL_BASE, works="rope_parameters", why="transformers does not read it in OLMo 3")
    if not fields.inner("rope_parameters").value:
        why = "transformers 4 and 5 rotate the layers with a window differently"
        works = f"{_BASE:g}, or rope_parameters with an object for each kind of layer"
        fields.only("rope_theta", _BASE, int(_BASE), why=why, works=works)
    windows = llama_like.read_layer_windows(fields, llama_like.every_nth_full(fields, 4))
    return _read(fields, rope={"window_base": _BASE}, **windows)


def _write(model: ModelConfig, longest: int, **rope: Any) -> dict[str, Any]:
    return {**llama_like.write(model, longest, **rope), "attention_bias": model.has_qkv_bias}


def _write_olmo3(model: ModelConfig, longest: int) -> dict[str, Any]:
    entries = _write(model, longest, by_layer=True) | llama_like.write_layer_windows(model)
    del entries[_LOCAL_BASE]
    windows = entries["rope_parameters"]["sliding_attention"]
    if windows != {"rope_type": "default", "rope_theta": model.rotary_base}:
        # transformers 4 would rotate windows with the default type, so it must refuse the file. It
        # refuses an object without a type; version 5 adds the object to rope_parameters, where it
        # changes nothing.
        entries["rope_scaling"] = {"rope_theta": model.rotary_base}
    return entries


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read=_read,
    write=_write,
    modules=MODULES,
    defaults={"rms_norm_eps": 1e-5},
)
OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    read=_read_olmo3,
    write=_write_olmo3,
    modules=MODULES,
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": _BASE},
)
