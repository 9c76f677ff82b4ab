"""Qwen3.5 without images: Qwen3-Next with other names, whose projections are tensors of their own.

The published folders hold a model that also reads images. Of these, the language model is read. The
heads that predict further tokens (``mtp``) are not read, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

from cp_megatron.families import qwen3_next
from cp_megatron.families.family import Family

_LAYER, _OURS = "model.layers.{}.linear_attn", "layers.{}.recurrence"
# Positions of text are the same in all sections, so the sections change nothing.
_ROPE: Mapping[str, None] = {"mrope_section": None, "mrope_interleaved": None}

QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    read=lambda fields: qwen3_next.read(fields, rope={"more": _ROPE}),
    write=qwen3_next.write,
    modules={
        **qwen3_next.MODULES,
        f"{_LAYER}.in_proj_qkv": f"{_OURS}.query {_OURS}.key {_OURS}.value",
        f"{_LAYER}.in_proj_z": f"{_OURS}.gate",
        f"{_LAYER}.in_proj_b": f"{_OURS}.rate",
        f"{_LAYER}.in_proj_a": f"{_OURS}.decay_input",
    },
    grouped=qwen3_next.GROUPED,
    defaults=qwen3_next.DEFAULTS,
    container="Qwen3_5ForConditionalGeneration",
    buffers=r"mtp\..*|model\.visual\..*",
)
