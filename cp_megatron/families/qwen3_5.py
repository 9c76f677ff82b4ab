"""Qwen3.5 without images: Qwen3-Next with other names, whose projections are tensors of their own.

The MLPs are dense in all layers, or mixtures of experts in all layers, as in Qwen3-Next.

The published folders hold a model that also reads images. Of these, the language model is read. The
heads that predict further tokens (``mtp``) are not read, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import mixture, qwen3_next
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_LAYER, _OURS = "model.layers.{}.linear_attn", "layers.{}.recurrence"
# Positions of text are the same in all sections, so the sections change nothing.
_ROPE: Mapping[str, None] = {"mrope_section": None, "mrope_interleaved": None}

_MODULES: Mapping[str, str] = {
    **qwen3_next.MODULES,
    f"{_LAYER}.in_proj_qkv": f"{_OURS}.query {_OURS}.key {_OURS}.value",
    f"{_LAYER}.in_proj_z": f"{_OURS}.gate",
    f"{_LAYER}.in_proj_b": f"{_OURS}.rate",
    f"{_LAYER}.in_proj_a": f"{_OURS}.decay_input",
}
_IGNORED = r"mtp\..*|model\.visual\..*"


def _read_mixture(fields: JsonFields) -> ModelConfig:
    experts = qwen3_next.read_experts(fields, range(fields.size("num_hidden_layers")))
    if not experts:
        raise fields.wrong("num_experts", "but there must be experts")
    # It has no dense layers, and so no width of them.
    width = experts["moe_ffn_hidden_size"]
    return qwen3_next.read(fields, rope={"more": _ROPE}, ffn_hidden_size=width, **experts)


QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    read=lambda fields: qwen3_next.read(fields, rope={"more": _ROPE}),
    write=qwen3_next.write,
    modules=_MODULES,
    grouped=qwen3_next.GROUPED,
    defaults=qwen3_next.DEFAULTS,
    container="Qwen3_5ForConditionalGeneration",
    buffers=_IGNORED,
)
QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    read=_read_mixture,
    write=lambda model, longest: {
        **qwen3_next.write(model, longest),
        **qwen3_next.write_experts(model),
    },
    modules={**_MODULES, **qwen3_next.EXPERTS},
    grouped=qwen3_next.GROUPED,
    other_names=mixture.STACKED,
    defaults={
        **qwen3_next.DEFAULTS,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    container="Qwen3_5MoeForConditionalGeneration",
    buffers=_IGNORED,
)
