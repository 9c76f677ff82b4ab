"""Granite 3 and 4: config.json of published models as flags and back; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.errors import ConfigError
from tests.families.literal import model_of, written

GRANITE: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12800,
    "logits_scaling": 49.0,  # 1 / (1 / 49) is not 49 in floating point
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49159,
}
HYBRID: dict[str, Any] = {
    **{key: value for key, value in GRANITE.items() if key != "mlp_bias"},
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "layer_types": ["attention"] * 4,
    "mamba_n_heads": 128,
    "mamba_d_state": 256,
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "output_router_logits": False,
    "position_embedding_type": "nope",
    "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 8192,
}


def test_the_factors_of_granite(tmp_path: Path) -> None:
    model = model_of(tmp_path, GRANITE)
    assert (model.embedding_multiplier, model.residual_multiplier) == (12.0, 0.22)
    assert (model.softmax_scale, model.logit_multiplier) == (0.0078125, 1 / 49)
    entries = written(model, "granite")
    assert {key: entries[key] for key in GRANITE} == GRANITE


def test_the_defaults_of_granite(tmp_path: Path) -> None:
    scaled = ("attention_multiplier", "logits_scaling", "embedding_multiplier")
    entries = {key: value for key, value in GRANITE.items() if key not in scaled}
    model = model_of(tmp_path, entries)
    assert (model.softmax_scale, model.logit_multiplier, model.embedding_multiplier) == (1, 1, 1)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_biases_of_granite(tmp_path: Path, attention: bool, mlp: bool) -> None:
    model = model_of(tmp_path, GRANITE, attention_bias=attention, mlp_bias=mlp)
    assert (model.has_qkv_bias, model.has_attention_output_bias) == (attention, attention)
    assert model.has_mlp_bias == mlp
    entries = written(model, "granite")
    assert (entries["attention_bias"], entries["mlp_bias"]) == (attention, mlp)


def test_the_scale_of_scores_is_written_if_it_is_the_default(tmp_path: Path) -> None:
    model = replace(model_of(tmp_path, GRANITE), softmax_scale=None)
    assert written(model, "granite")["attention_multiplier"] == 128**-0.5


def test_a_hybrid_of_attention_alone(tmp_path: Path) -> None:
    model = model_of(tmp_path, HYBRID)
    assert (model.position_embedding_type, model.ffn_size) == ("none", 8192)
    assert model.logit_multiplier == 1 / 49
    entries = written(model, "granitemoehybrid")
    same = HYBRID.keys() & entries.keys() - {"mamba_n_heads", "intermediate_size"}
    assert {key: entries[key] for key in same} == {key: HYBRID[key] for key in same}
    assert entries["layer_types"] == ["attention"] * 4
    new = model_of(
        tmp_path, HYBRID, layer_types=["full_attention"] * 4, position_embedding_type=None
    )
    assert new == model


def test_a_hybrid_that_rotates(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    model = model_of(tmp_path, HYBRID, position_embedding_type="rope", rope_scaling=scaling)
    assert (model.position_embedding_type, model.rope_type) == ("rope", "linear")
    unused = model_of(tmp_path, HYBRID, rope_scaling=scaling)
    assert (unused.position_embedding_type, unused.rope_type) == ("none", "default")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layer_types": ["mamba", "attention"] * 2}, "layer_types is .*it has Mamba layers"),
        ({"layer_types": ["linear_attention"] * 4}, "it has Mamba layers"),
        ({"layer_types": None}, "layer_types is null, .*it has Mamba layers"),
        ({"layer_types": ["attention"] * 3}, "must be a list of 4 times"),
        ({"layer_types": 7}, "must be a list of 4 times"),
        ({"position_embedding_type": "alibi"}, 'position_embedding_type is "alibi", which is not'),
        ({"normalization_function": "layernorm"}, "normalization_function"),
        ({"attention_multiplier": 0}, "attention_multiplier is 0, but must be a number of"),
        ({"logits_scaling": 0.0}, "logits_scaling is 0.0, but must be a number of at least"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        model_of(tmp_path, HYBRID, **changes)


def test_experts_are_the_default_of_transformers(tmp_path: Path) -> None:
    less = {"num_local_experts", "num_experts_per_tok"}
    model = model_of(tmp_path, {key: value for key, value in HYBRID.items() if key not in less})
    assert (model.num_experts, model.moe_router_topk) == (8, 2)
