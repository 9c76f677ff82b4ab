"""Families of mixtures of experts: what their config.json sets, and what is written or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.config.files.presets import PRESETS
from cp_megatron.families.qwen3_moe import QWEN3_MOE
from cp_megatron.families.registry import to_hf_config
from cp_megatron.spec import ModelSpec
from tests.families.literal import check, differs, read, refused
from tests.families.mixture_configs import (
    GLM_AIR,
    GPT_OSS_20B,
    GRANITE_MOE,
    MIXTRAL,
    MOONLIGHT,
    OLMOE,
    QWEN3_5_MOE,
    QWEN3_30B,
)
from tests.families.test_deepseek import V2_LITE, V3


def test_qwen3_moe(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        QWEN3_30B,
        num_experts=128,
        moe_router_topk=8,
        expert_size=768,
        moe_router_pre_softmax=False,
        expert_layers=tuple(range(48)),
        qk_layernorm=True,
        window_size=None,
    )
    kept = QWEN3_30B.keys() - {"max_window_layers", "output_router_logits", "router_aux_loss_coef"}
    assert {key: written[key] for key in kept} == {key: QWEN3_30B[key] for key in kept}
    assert read(tmp_path, {**QWEN3_30B, "norm_topk_prob": False}).model.moe_router_pre_softmax
    newer = {key: value for key, value in QWEN3_30B.items() if key != "num_experts"}
    assert read(tmp_path, {**newer, "num_local_experts": 64}).model.num_experts == 64
    windows = {"use_sliding_window": True, "sliding_window": 9}
    written = check(tmp_path, {**QWEN3_30B, **windows}, window_size=(8, 0), window_layers=None)
    assert (written["use_sliding_window"], written["sliding_window"]) == (True, 9)


def test_the_preset_is_the_published_model(tmp_path: Path) -> None:
    model = PRESETS["qwen3-30b-a3b"].model
    published = read(tmp_path, QWEN3_30B).model
    trained = replace(model, vocab_size=151936, moe_aux_loss_coeff=0.0)
    family, written = to_hf_config(trained, vocab_size=151936, seq_length=40960, eod=151645)
    assert family is QWEN3_MOE
    assert read(tmp_path, written).model == published
    spec = ModelSpec.of(model, vocab_size=151936, seq_length=40960)
    assert spec.num_parameters() == 30_532_122_624
    assert spec.num_active_parameters() == 3_353_032_704


def test_the_toy_has_as_many_active_parameters_as_the_dense_one() -> None:
    dense, mixture = (
        ModelSpec.of(PRESETS[name].model, vocab_size=384, seq_length=1024)
        for name in ("toy", "toy-moe")
    )
    assert 0 < mixture.num_active_parameters() / dense.num_active_parameters() - 1 < 0.01
    assert dense.num_active_parameters() == dense.num_parameters()


def test_dense_layers_among_those_with_experts(tmp_path: Path) -> None:
    some = {**QWEN3_30B, "num_hidden_layers": 6, "mlp_only_layers": [3], "decoder_sparse_step": 2}
    written = check(tmp_path, some, moe_layers=(1, 5), ffn_size=6144)
    assert (written["decoder_sparse_step"], written["mlp_only_layers"]) == (1, [0, 2, 3, 4])
    every_third = replace(read(tmp_path, some).model, moe_layers=None, moe_layer_freq=3)
    _, written = to_hf_config(every_third, vocab_size=151936, seq_length=8, eod=2)
    assert written["mlp_only_layers"] == [1, 2, 4, 5]
    dense = check(tmp_path, {**some, "mlp_only_layers": [1, 3, 5]}, num_experts=None)
    assert dense["num_experts"] == 0


def test_mixtral(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        MIXTRAL,
        num_experts=8,
        moe_router_topk=2,
        expert_size=14336,
        moe_router_pre_softmax=False,
        window_size=None,
    )
    assert (written["num_local_experts"], written["intermediate_size"]) == (8, 14336)


def test_gpt_oss(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        GPT_OSS_20B,
        num_experts=32,
        moe_router_topk=4,
        expert_size=2880,
        quick_geglu=True,
        swiglu=False,
        activation_func_clamp_value=7.0,
        glu_linear_offset=1.0,
        moe_router_add_bias=True,
        softmax_type="learnable",
        has_qkv_bias=True,
        has_mlp_bias=True,
        window_size=(127, 0),
        window_layers=tuple(range(0, 24, 2)),
        rope_truncate=False,
    )
    same = {"swiglu_limit", "sliding_window", "layer_types", "attention_bias", "num_local_experts"}
    assert {key: written[key] for key in same} == {key: GPT_OSS_20B[key] for key in same}
    check(tmp_path, {**GPT_OSS_20B, "attention_bias": False}, has_qkv_bias=False, has_mlp_bias=True)
    without = {key: value for key, value in GPT_OSS_20B.items() if key != "layer_types"}
    assert read(tmp_path, without).model == read(tmp_path, GPT_OSS_20B).model


def test_deepseek_v3(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        {**V3, "num_hidden_layers": 61},
        num_experts=256,
        moe_router_topk=8,
        expert_size=2048,
        expert_layers=tuple(range(3, 61)),
        moe_router_score_function="sigmoid",
        moe_router_norm_topk_prob=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        group_num_scores=2,
        moe_shared_expert_intermediate_size=2048,
        moe_shared_expert_gate=False,
    )
    same = V3.keys() & written.keys() - {"num_hidden_layers", "rope_scaling"}
    assert {key: written[key] for key in same} == {key: V3[key] for key in same}


def test_moonlight(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        MOONLIGHT,
        num_experts=64,
        expert_layers=tuple(range(1, 27)),
        moe_router_num_groups=None,
        moe_shared_expert_intermediate_size=2816,
        moe_router_topk_scaling_factor=2.446,
    )
    assert (written["n_group"], written["n_shared_experts"]) == (1, 2)


def test_deepseek_v2(tmp_path: Path) -> None:
    v2 = {**V2_LITE, "num_hidden_layers": 27, "norm_topk_prob": False, "scoring_func": "softmax"}
    v2 |= {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408}
    v2 |= {"routed_scaling_factor": 1.0, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
    flags = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}
    written = check(tmp_path, v2, **flags, num_experts=64, moe_router_num_groups=None)
    assert written["topk_method"] == "greedy"
    groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    written = check(
        tmp_path, {**v2, **groups}, **flags, moe_router_num_groups=8, group_num_scores=1
    )
    assert {key: written[key] for key in groups} == groups
    # greedy has no groups, whatever else config.json says
    assert read(tmp_path, {**v2, **groups, "topk_method": "greedy"}).model == (
        read(tmp_path, v2).model
    )
    refused(
        tmp_path, {**v2, "norm_topk_prob": True}, "transformers does not read it in DeepSeek V2"
    )
    refused(tmp_path, {**v2, "mlp_bias": True}, "it has none in experts, but in dense layers")
    refused(tmp_path, {**v2, "topk_method": "noaux_tc"}, 'topk_method is "noaux_tc"')


def test_glm4_moe(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        GLM_AIR,
        num_experts=128,
        expert_layers=tuple(range(1, 46)),
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        has_qkv_bias=True,
        has_attention_output_bias=False,
        qk_layernorm=False,
        rotary_percent=0.5,
    )
    assert (written["use_qk_norm"], written["n_shared_experts"]) == (False, 1)
    check(tmp_path, {**GLM_AIR, "use_qk_norm": True}, qk_layernorm=True, qk_norm_scope="head")


def test_olmoe_and_granite(tmp_path: Path) -> None:
    check(
        tmp_path,
        OLMOE,
        num_experts=64,
        moe_router_pre_softmax=True,
        qk_norm_scope="all_heads",
        expert_size=1024,
    )
    check(
        tmp_path,
        GRANITE_MOE,
        num_experts=40,
        moe_router_pre_softmax=False,
        residual_multiplier=0.22,
        expert_size=512,
        moe_shared_expert_intermediate_size=None,
    )


def test_qwen3_5_moe(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        QWEN3_5_MOE,
        num_experts=256,
        moe_router_topk=8,
        moe_shared_expert_intermediate_size=512,
        moe_shared_expert_gate=True,
        moe_router_pre_softmax=False,
        linear_layers=(0, 1, 2, 4, 5, 6),
    )
    assert (written["num_experts"], written["shared_expert_intermediate_size"]) == (256, 512)


@pytest.mark.parametrize(
    ("entries", "changes", "told"),
    [
        (QWEN3_30B, {"num_experts_per_tok": 129}, "is 129, but there are 128 experts"),
        (QWEN3_30B, {"mlp_only_layers": 3}, "mlp_only_layers is 3, but must be a list of layers"),
        (QWEN3_30B, {"norm_topk_prob": 1}, "norm_topk_prob is 1, but must be true or false"),
        (QWEN3_30B, {"num_experts": -1}, "num_experts is -1, but must be a number"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "reads its input without noise"),
        (MIXTRAL, {"num_local_experts": 0}, "num_local_experts is 0, but there must be experts"),
        (MIXTRAL, {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "mxfp4"}}, "are not quantized"),
        (GPT_OSS_20B, {"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5, which is not supported"),
        (GPT_OSS_20B, {"experts_per_token": 2}, "experts_per_token is 2, which is not supported"),
        (GPT_OSS_20B, {"rope_scaling": None}, "replaces by the rope of gpt-oss"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv is 8.0, .* are not clipped"),
        (GRANITE_MOE, {"num_local_experts": 0}, "but there must be experts"),
        (QWEN3_5_MOE, {"num_experts": 0}, "num_experts is 0, but there must be experts"),
        (GLM_AIR, {"n_group": 3}, "n_group is 3, but must divide 128 experts into groups"),
        (GLM_AIR, {"n_group": 128}, "into groups of at least 2"),
        (GLM_AIR, {"n_group": 64, "topk_group": 2}, "topk_group is 2, but must be at most 64"),
        (GLM_AIR, {"n_group": 4, "topk_group": 5}, "topk_group is 5, but must be at most 4"),
        (GLM_AIR, {"first_k_dense_replace": -1}, "must be the number of dense layers"),
        (MOONLIGHT, {"scoring_func": "softmax"}, 'scoring_func is "softmax", which is not'),
        (MOONLIGHT, {"topk_method": "greedy"}, 'topk_method is "greedy", which is not supported'),
        (MOONLIGHT, {"moe_layer_freq": 2}, "every layer after the dense ones has experts"),
        (MOONLIGHT, {"n_shared_experts": 0}, "n_shared_experts is 0, but must be a whole number"),
    ],
)
def test_refused(
    tmp_path: Path, entries: Mapping[str, Any], changes: dict[str, Any], told: str
) -> None:
    refused(tmp_path, {**entries, **changes}, told)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"moe_router_enable_expert_bias": True}, "--moe-router-enable-expert-bias"),
        ({"moe_router_add_bias": True}, "--moe-router-add-bias"),
        ({"moe_router_num_groups": 8, "moe_router_group_topk": 4}, "--moe-router-num-groups"),
        ({"glu_linear_offset": 1.0}, "--glu-linear-offset"),
        ({"moe_router_topk_scaling_factor": 2.0}, "--moe-router-topk-scaling-factor"),
    ],
)
def test_what_no_architecture_has(tmp_path: Path, changes: dict[str, Any], flag: str) -> None:
    differs(replace(read(tmp_path, QWEN3_30B).model, **changes), flag)


def test_how_experts_are_balanced_is_no_part_of_a_folder(tmp_path: Path) -> None:
    model = read(tmp_path, QWEN3_30B).model
    balanced = replace(
        model,
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.1,
        moe_router_load_balancing_type="aux_loss",
        moe_router_dtype="model",
    )
    pair = [to_hf_config(x, vocab_size=300, seq_length=8, eod=1)[1] for x in (model, balanced)]
    assert pair[0] == pair[1]
