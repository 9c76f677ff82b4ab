"""Qwen3-Next: gated DeltaNets, gated attention in every n-th layer, and experts in some layers.

A shared expert computes every token beside the chosen ones, times a gate.

The folder stores the rows of several projections head by head, in groups of a key head:

    in_proj_qkvz    query, key, value, gate of key head 0; query, ... of key head 1; ...
    in_proj_ba      rate, input of the decay of key head 0; ...
    q_proj          query, gate of query head 0; ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like, mixture
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.rope_fields import LAYER_KINDS

_FULL, _LINEAR = LAYER_KINDS[0], "linear_attention"
LINEAR_SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim"),
)
"""The sizes of recurrences, which have the same names in config.json and in ``ModelConfig``."""
_SHARED = "shared_expert_intermediate_size"
_LAYER = "model.layers.{}.linear_attn"
_OURS = "layers.{}.recurrence"

MODULES: Mapping[str, str] = {
    **llama_like.MODULES,
    "model.layers.{}.self_attn.q_proj": "layers.{}.attention.query layers.{}.attention.gate",
    f"{_LAYER}": f"{_OURS}.decay",
    f"{_LAYER}.conv1d": f"{_OURS}.query_conv {_OURS}.key_conv {_OURS}.value_conv",
    f"{_LAYER}.norm": f"{_OURS}.norm",
    f"{_LAYER}.out_proj": f"{_OURS}.out",
}
"""The tensor names that Qwen3-Next and Qwen3.5 share."""
EXPERTS: Mapping[str, str] = {
    **mixture.ROUTER,
    **mixture.EXPERTS,
    **mixture.shared_names("shared_expert"),
    "model.layers.{}.mlp.shared_expert_gate": "layers.{}.mlp.shared_gate",
}
"""The tensor names of experts that Qwen3-Next and Qwen3.5-MoE share."""
GROUPED: Mapping[str, Callable[[ModelConfig], int]] = {
    "q_proj": lambda model: model.num_attention_heads
}
"""The tensors of both that alternate head by head."""
DEFAULTS: Mapping[str, Any] = {
    **dict(zip(LINEAR_SIZES, (16, 32, 128, 128, 4))),
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
}
"""The defaults that both have."""


def read(fields: JsonFields, **flags: Any) -> ModelConfig:
    """Reads what Qwen3-Next and Qwen3.5 share; ``flags`` are those of ``llama_like.read``."""
    fields.only("attn_output_gate", True)
    fields.get("mamba_ssm_dtype")  # states are always float32 or float64
    sizes = {name: fields.size(name) for name in LINEAR_SIZES}
    key_heads, heads = sizes["linear_num_key_heads"], sizes["linear_num_value_heads"]
    if heads % key_heads:
        rule = f"but must be a multiple of linear_num_key_heads {key_heads}"
        raise fields.wrong("linear_num_value_heads", rule)
    flags |= sizes
    return llama_like.read(
        fields,
        linear_attention_layers=_read_layers(fields),
        attention_output_gate=True,
        qk_layernorm=True,
        apply_layernorm_1p=True,
        **llama_like.read_biases(fields, mlp=None),
        **flags,
    )


def _read_layers(fields: JsonFields) -> tuple[int, ...] | None:
    """The layers that are recurrences, by ``layer_types`` or else all but every n-th."""
    layers, every = fields.size("num_hidden_layers"), fields.size("full_attention_interval", 4)
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [_LINEAR if (layer + 1) % every else _FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.wrong("layer_types", f"but must be a list of {layers} entries, one per layer")
    if any(kind not in (_FULL, _LINEAR) for kind in kinds):
        raise fields.unsupported("layer_types", f"{_FULL}, {_LINEAR}")
    return tuple(n for n, kind in enumerate(kinds) if kind == _LINEAR) or None


def write(model: ModelConfig, longest: int) -> dict[str, Any]:
    """Writes what ``read`` reads."""
    return {
        **llama_like.write(model, longest, partial=True),
        "attention_bias": model.has_attention_output_bias,
        **{name: getattr(model, name) for name in LINEAR_SIZES},
        "layer_types": [
            _LINEAR if model.is_linear(layer) else _FULL for layer in range(model.num_layers)
        ],
    }


def read_experts(fields: JsonFields, layers: Sequence[int], **flags: Any) -> dict[str, Any]:
    """Reads the experts of both, in these layers; ``flags`` are more fields of ``ModelConfig``."""
    experts = mixture.read_experts(
        fields, layers, count=("num_experts",), unread=(_SHARED, "norm_topk_prob"), **flags
    )
    if not experts:
        return {}
    shared = {"moe_shared_expert_intermediate_size": fields.size(_SHARED)}
    return {**experts, **shared, "moe_shared_expert_gate": True}


def write_experts(model: ModelConfig) -> dict[str, Any]:
    """Writes what ``read_experts`` reads."""
    written = mixture.write_experts(model, count="num_experts")
    shared = model.moe_shared_expert_intermediate_size
    return written if shared is None else {**written, _SHARED: shared}


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    read=lambda fields: read(
        fields,
        **read_experts(
            fields,
            mixture.sparse_layers(fields),
            moe_router_pre_softmax=not fields.switch("norm_topk_prob"),
        ),
    ),
    write=lambda model, longest: {
        **write(model, longest),
        **write_experts(model),
        **mixture.write_sparse_layers(model),
        "norm_topk_prob": not model.moe_router_pre_softmax,
    },
    modules={
        **MODULES,
        **EXPERTS,
        f"{_LAYER}.in_proj_qkvz": " ".join(
            f"{_OURS}.{name}" for name in ("query", "key", "value", "gate")
        ),
        f"{_LAYER}.in_proj_ba": f"{_OURS}.rate {_OURS}.decay_input",
    },
    grouped={
        **GROUPED,
        "in_proj_qkvz": lambda model: model.linear_num_key_heads,
        "in_proj_ba": lambda model: model.linear_num_key_heads,
    },
    other_names=mixture.STACKED,
    defaults={
        **DEFAULTS,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        _SHARED: 512,
        "norm_topk_prob": True,
    },
    buffers=r"mtp\..*",
)
