"""Qwen3-Next without experts: gated DeltaNets, and gated attention in every n-th layer.

The folder stores the rows of several projections head by head, in groups of a key head:

    in_proj_qkvz    query, key, value, gate of key head 0; query, ... of key head 1; ...
    in_proj_ba      rate, input of the decay of key head 0; ...
    q_proj          query, gate of query head 0; ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.rope_fields import LAYER_KINDS

_FULL, _LINEAR = LAYER_KINDS[0], "linear_attention"
LINEAR_SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim"),
)
"""The sizes of recurrences, which have the same names in config.json and in ``ModelConfig``."""
# Keys that a model without experts does not need.
_EXPERTS = (
    *("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok"),
    *("norm_topk_prob", "router_aux_loss_coef"),
)
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


def _read(fields: JsonFields) -> ModelConfig:
    dense, layers = fields.get("mlp_only_layers") or [], fields.size("num_hidden_layers")
    step, experts = fields.size("decoder_sparse_step", 1), fields.number("num_experts")
    if not isinstance(dense, list):
        raise fields.wrong("mlp_only_layers", "but must be a list of layers")
    sparse = [n for n in range(layers) if n not in dense and (n + 1) % step == 0]
    if experts and sparse:
        why = f"layer {sparse[0]} is a mixture of experts"
        raise fields.unsupported("num_experts", "0", why)
    for name in _EXPERTS:
        fields.get(name)
    return read(fields)


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **write(model, longest),
        "num_experts": 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.num_layers)),
    },
    modules={
        **MODULES,
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
    defaults={**DEFAULTS, "num_experts": 512},
    buffers=r"mtp\..*",
)
