"""Shared code of the families whose layers are mixtures of experts.

Folders hold a tensor for each expert and matrix; transformers stacks those of a layer when it loads
them, and a folder may hold them so, too. Both are read, and the first is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.json_fields import JsonFields

EXPERT_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.name.startswith("moe_") or field.name == "num_experts"
)
"""The fields of ``ModelConfig`` that describe experts."""
BALANCE_FIELDS = frozenset(
    {"moe_router_bias_update_rate", "moe_router_dtype", "moe_router_load_balancing_type"}
    | {"moe_aux_loss_coeff", "moe_z_loss_coeff"}
)
"""Those that do not change what a trained model computes, but for rounding."""

_LAYER, _OURS = "model.layers.{}.mlp", "layers.{}.mlp"
ROUTER: Mapping[str, str] = {f"{_LAYER}.gate": f"{_OURS}.router"}
"""The name of the router of most families."""
EXPERTS: Mapping[str, str] = {
    f"{_LAYER}.experts.{{}}.{name}_proj.weight": f"{_OURS}.experts.{name}"
    for name in ("gate", "up", "down")
}
"""The names of experts in the folders of most families."""
STACKED: Mapping[str, str] = {
    f"{_LAYER}.experts.gate_up_proj": f"{_OURS}.experts.gate {_OURS}.experts.up",
    f"{_LAYER}.experts.down_proj": f"{_OURS}.experts.down",
}
"""Their names in folders that stack them."""
EXPERT_BIAS: Mapping[str, str] = {
    f"{_LAYER}.gate.e_score_correction_bias": f"{_OURS}.router.expert_bias"
}
"""The name of the biases of experts in DeepSeek-V3 and GLM-4.5."""

# They describe how a model was trained, or are entries of programs that only run it.
_TRAINING = (
    *("router_aux_loss_coef", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size"),
)


def shared_names(theirs: str) -> dict[str, str]:
    """The names of an MLP that computes every token, from the name of its module."""
    return {
        f"{_LAYER}.{theirs}.{name}_proj": f"{_OURS}.shared.{name}"
        for name in ("gate", "up", "down")
    }


def read_experts(
    fields: JsonFields,
    layers: Sequence[int],
    *,
    count: Sequence[str],
    width: str = "moe_intermediate_size",
    unread: Sequence[str] = (),
    **flags: Any,
) -> dict[str, Any]:
    """Reads the number and the size of experts.

    Args:
        fields: config.json.
        layers: the layers that have experts unless their number is 0.
        count: the keys of the number of experts; the first one that config.json has, counts.
        width: the key of the width of an expert.
        unread: keys without effect in a model that has no experts.
        flags: further fields of ``ModelConfig``.

    Returns:
        the fields of ``ModelConfig`` about experts; nothing if no layer has any.
    """
    for name in (*_TRAINING, *(key for key in count[1:] if key in fields.value)):
        fields.get(name)
    key = next((key for key in count if key in fields.value), count[0])
    if not layers or not fields.number(key):
        for name in (key, width, "num_experts_per_tok", *unread):
            fields.get(name)
        return {}
    experts, topk = fields.size(key), fields.size("num_experts_per_tok")
    if topk > experts:
        raise fields.wrong("num_experts_per_tok", f"but there are {experts} experts")
    whole = len(layers) == fields.size("num_hidden_layers")
    return {
        "num_experts": experts,
        "moe_layers": None if whole else tuple(layers),
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": fields.size(width),
        **flags,
    }


def read_groups(
    fields: JsonFields, experts: int, topk: int, *, num_scores: int
) -> dict[str, int | None]:
    """Reads groups of experts, of which a token uses the best ones.

    Args:
        fields: config.json.
        experts, topk: number of experts of a layer and of a token.
        num_scores: how many of its best scores rank a group in this family.
    """
    groups = fields.size("n_group", 1)
    best = fields.size("topk_group", 1)
    if experts % groups or experts // groups < num_scores:
        rule = f"but must divide {experts} experts into groups of at least {num_scores}"
        raise fields.wrong("n_group", rule)
    if not best <= groups or topk > best * (experts // groups):
        raise fields.wrong("topk_group", f"but must be at most {groups}, with {topk} experts in it")
    if best == groups:
        return {}
    return {
        "moe_router_num_groups": groups,
        "moe_router_group_topk": best,
        "moe_router_group_num_scores": num_scores,
    }


def sparse_layers(fields: JsonFields) -> list[int]:
    """The layers that have experts in Qwen's families, whose number may be 0."""
    dense, layers = fields.get("mlp_only_layers") or [], fields.size("num_hidden_layers")
    step = fields.size("decoder_sparse_step", 1)
    if not isinstance(dense, list):
        raise fields.wrong("mlp_only_layers", "but must be a list of layers")
    return [n for n in range(layers) if n not in dense and (n + 1) % step == 0]


def write_sparse_layers(model: ModelConfig) -> dict[str, Any]:
    """Writes what ``sparse_layers`` reads."""
    dense = [layer for layer in range(model.num_layers) if not model.has_experts(layer)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def write_experts(
    model: ModelConfig, *, count: str, width: str = "moe_intermediate_size"
) -> dict[str, Any]:
    """Writes what ``read_experts`` reads."""
    if model.num_experts is None:
        return {count: 0}
    return {
        count: model.num_experts,
        "num_experts_per_tok": model.moe_router_topk,
        width: model.expert_size,
    }


def flags_of(model: ModelConfig) -> Iterator[tuple[str, Any]]:
    """The flags about experts that decide what a model computes, with defaults filled in and those
    without effect None."""
    names = {name for name in EXPERT_FIELDS if name not in BALANCE_FIELDS}
    if not (model.num_experts and model.expert_layers):
        yield from dict.fromkeys(names).items()
        return
    some = len(model.expert_layers) < model.num_layers
    yield "moe_layer_freq", None  # ``moe_layers`` says as much
    yield "moe_layers", model.expert_layers if some else None
    yield "moe_ffn_hidden_size", model.expert_size
    yield "moe_router_topk_scaling_factor", model.moe_router_topk_scaling_factor or 1.0
    if not some:
        yield "ffn_hidden_size", None
    softmax = model.moe_router_score_function == "softmax"
    yield "moe_router_norm_topk_prob" if softmax else "moe_router_pre_softmax", None
    groups, best = model.moe_router_num_groups or 1, model.moe_router_group_topk or 1
    limited = best < groups
    yield "moe_router_num_groups", groups if limited else None
    yield "moe_router_group_topk", best if limited else None
    yield "moe_router_group_num_scores", model.group_num_scores if limited else None
    if model.moe_shared_expert_intermediate_size is None:
        yield "moe_shared_expert_gate", None
