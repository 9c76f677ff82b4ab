"""StableLM 2: what its config.json sets, and what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.families.registry import to_hf_config
from tests.families.literal import check, differs, read, refused

STABLELM_2_12B: dict[str, Any] = {
    "architectures": ["StableLmForCausalLM"],
    "model_type": "stablelm",
    "eos_token_id": 100257,
    "hidden_dropout": 0.0,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.25,
    "qk_layernorm": True,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "use_qkv_bias": False,
    "vocab_size": 100352,
}


def test_stablelm_2_12b(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        STABLELM_2_12B,
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        norm_bias="residual",
        parallel_residual=True,
        qk_layernorm=True,
        qk_norm_scope="each_head",
        has_qkv_bias=False,
        rotary_percent=0.25,
        rotary_dim=40,
        rotary_interleaved=False,
        untie_embeddings_and_output_weights=True,
    )
    for key, value in STABLELM_2_12B.items():
        assert written[key] == value, key
    assert not {"head_dim", "rms_norm_eps"} & written.keys()


def test_every_head_has_a_tensor_for_its_norm(tmp_path: Path) -> None:
    found = read(tmp_path, STABLELM_2_12B)
    tensors = found.family.tensors(found.model, vocab_size=100352, seq_length=8)
    norms = [x for x in tensors if x.key.startswith("model.layers.1.self_attn.k_layernorm")]
    assert [x.key for x in norms] == [
        f"model.layers.1.self_attn.k_layernorm.norms.{head}.weight" for head in range(8)
    ]
    assert {x.shape for x in norms} == {(160,)}
    names = {x.key.removeprefix("model.layers.0.") for x in tensors}
    assert {"input_layernorm.weight", "input_layernorm.bias"} <= names
    assert "post_attention_layernorm.weight" not in names


def test_the_small_one_has_biases_and_reads_two_norms(tmp_path: Path) -> None:
    said = {"qk_layernorm", "use_parallel_residual", "partial_rotary_factor"}
    entries = {key: STABLELM_2_12B[key] for key in STABLELM_2_12B.keys() - said}
    written = check(
        tmp_path,
        {**entries, "use_qkv_bias": True, "num_key_value_heads": 32},
        parallel_residual=False,
        qk_layernorm=False,
        norm_bias="all",
        add_qkv_bias=True,
        has_attention_output_bias=False,
        rotary_percent=0.25,
    )
    assert (written["use_qkv_bias"], written["use_parallel_residual"]) == (True, False)


def test_without_norms_of_heads_their_bias_is_no_difference(tmp_path: Path) -> None:
    model = read(tmp_path, {**STABLELM_2_12B, "qk_layernorm": False}).model
    family, _ = to_hf_config(
        replace(model, norm_bias="residual"), vocab_size=300, seq_length=8, eod=1
    )
    assert family.model_type == "stablelm"
    differs(replace(model, norm_bias="none"), "--norm-bias")
    differs(replace(model, norm_bias="all", qk_layernorm=True), "--norm-bias")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1, .* applies it to the MLP alone"),
        ({"head_dim": 128}, "head_dim is 128, which is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"use_qkv_bias": "no"}, 'use_qkv_bias is "no", but must be true or false'),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    refused(tmp_path, {**STABLELM_2_12B, **changes}, told)
