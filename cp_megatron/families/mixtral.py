"""Mixtral: Mistral with experts in all layers, whose weights sum to 1."""

from __future__ import annotations

from collections.abc import Mapping

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like, mixture
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_LAYER, _OURS = "model.layers.{}.block_sparse_moe", "layers.{}.mlp"
_NAMES: Mapping[str, str] = {"w1": "gate", "w3": "up", "w2": "down"}


def _read(fields: JsonFields) -> ModelConfig:
    fields.only("router_jitter_noise", 0.0, 0, why="the router reads its input without noise")
    windows = llama_like.read_layer_windows(fields, llama_like.all_or_none(fields))
    layers = range(fields.size("num_hidden_layers"))
    experts = mixture.read_experts(
        fields, layers, count=("num_local_experts",), width="intermediate_size"
    )
    if not experts:
        raise fields.wrong("num_local_experts", "but there must be experts")
    return llama_like.read(fields, **windows, **experts)


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        "sliding_window": llama_like.window_width(model),
        **mixture.write_experts(model, count="num_local_experts", width="intermediate_size"),
        "router_jitter_noise": 0.0,
    },
    modules={
        **llama_like.MODULES,
        f"{_LAYER}.gate": f"{_OURS}.router",
        **{
            f"{_LAYER}.experts.{{}}.{theirs}.weight": f"{_OURS}.experts.{ours}"
            for theirs, ours in _NAMES.items()
        },
    },
    other_names={**mixture.ROUTER, **mixture.STACKED},
    defaults={
        "num_key_value_heads": 8,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
)
