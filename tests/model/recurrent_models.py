"""Tiny recurrent models of transformers with long memories, in any type.

transformers casts to float32 in gates, rules and norms. For comparisons in float64, a model is made
of a copy of its modeling file that casts to float64 there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.model.family_table import causal_families

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
}
HYBRID = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in SIZES.items() if name not in names}


def layers(*types: str) -> dict[str, Any]:
    return {"layer_types": list(types), "num_hidden_layers": len(types)}


# A model type, and what its config changes.
QWEN3_NEXT = ("qwen3_next", {**SIZES, **DELTA, **layers(*HYBRID), "mlp_only_layers": [0, 1, 2, 3]})
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen3.5": ("qwen3_5_text", {**SIZES, **DELTA, **layers(*HYBRID)}),
    "Qwen3-Next": QWEN3_NEXT,
    "linear layers only": (
        "qwen3_next",
        {**QWEN3_NEXT[1], **layers(*["linear_attention"] * 3), "mlp_only_layers": [0, 1, 2]},
    ),
    "experts": (
        "qwen3_next",
        {
            **QWEN3_NEXT[1],
            "mlp_only_layers": [],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "OLMo-hybrid": ("olmo_hybrid", {**SIZES, **DELTA, **layers(*HYBRID)}),
    "Mamba2": (
        "mamba2",
        {
            **without("num_attention_heads", "num_key_value_heads"),
            "num_heads": 8,
            "n_groups": 2,
            "state_size": 6,
            "expand": 2,
            "chunk_size": 16,
            "num_hidden_layers": 2,
        },
    ),
    "Zamba2": (
        "zamba2",
        {
            **without("head_dim", "num_key_value_heads"),
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
            "n_mamba_heads": 4,
            "mamba_ngroups": 2,
            "mamba_d_state": 6,
            "chunk_size": 16,
        },
    ),
    "Kimi": (
        "kimi_linear",
        {
            **without("head_dim"),
            **layers(*HYBRID),
            "mlp_layer_types": ["dense"] * 4,
            "linear_num_heads": 2,
            "linear_head_dim": 8,
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


def modeling_file(kind: str, config: Any, dtype: torch.dtype) -> Any:
    """The class of a model type, in float64 from a copy of its file that never casts to float32."""
    package = type(config).__module__.rpartition(".")[0]
    name = f"{package}.modeling_{package.rpartition('.')[2]}"
    copy = f"{name}_in_float64"
    if dtype != torch.float64:
        copy = name
    elif copy not in sys.modules:
        spec = find_spec(name)
        assert spec is not None
        origin = str(spec.origin)
        text = Path(origin).read_text()
        wide = text.replace("float32", "float64").replace(".float()", ".double()")
        sys.modules[copy] = module = ModuleType(copy)
        module.__package__, module.__file__ = package, origin
        exec(compile(wide, origin, "exec"), vars(module))
    return getattr(importlib.import_module(copy), causal_families()[kind])


def make_model(name: str, attention: str, dtype: torch.dtype) -> Any:
    """The same weights every time, with long memories."""
    library = importlib.import_module("transformers")
    kind, changes = MODELS[name]
    config = library.CONFIG_MAPPING[kind](**changes)
    config._experts_implementation = "eager"
    torch.manual_seed(3)
    config._attn_implementation = attention
    model = modeling_file(kind, config, dtype)(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            drawn = torch.rand(parameter.shape, generator=generator).to(parameter.dtype)
            if place.endswith("A_log"):
                parameter.copy_((0.001 + 0.099 * drawn).log())
            elif place.endswith("dt_bias"):
                parameter.copy_(drawn)
            else:
                parameter.add_(0.1 * (drawn - 0.5))
    return model.to(dtype).train()
