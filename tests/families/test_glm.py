"""GLM and GLM-4: what their config.json sets, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.literal import check, read, refused

GLM4: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151552,
}


def test_glm4_9b(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        GLM4,
        rotary_percent=0.5,
        rotary_dim=64,
        rotary_interleaved=True,
        norm_placement="both",
        norm_epsilon=1e-5,
        add_qkv_bias=True,
        has_attention_output_bias=False,
        has_mlp_bias=False,
        num_kv_heads=2,
        untie_embeddings_and_output_weights=True,
    )
    differing = {"pad_token_id"}
    assert {key: written[key] for key in GLM4.keys() - differing} == {
        key: GLM4[key] for key in GLM4.keys() - differing
    }
    assert written["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    }


def test_glm_has_norms_before_only_and_defaults_of_its_own(tmp_path: Path) -> None:
    said = {"head_dim", "num_key_value_heads", "partial_rotary_factor", "rms_norm_eps"}
    entries = {key: GLM4[key] for key in GLM4.keys() - said - {"attention_bias"}}
    entries |= {"architectures": ["GlmForCausalLM"], "model_type": "glm"}
    written = check(
        tmp_path,
        entries,
        norm_placement="pre",
        head_dim=128,
        num_kv_heads=2,
        rotary_percent=0.5,
        norm_epsilon=1.5625e-7,
        add_qkv_bias=True,
    )
    assert written["model_type"] == "glm"
    rope = {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.25}
    inner = {**entries, "rope_parameters": rope, "attention_bias": False, "rope_theta": None}
    written = check(tmp_path, inner, rotary_percent=0.25, rotary_base=500.0, add_qkv_bias=False)
    assert (written["attention_bias"], written["partial_rotary_factor"]) == (False, 0.25)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", which is not supported'),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor is 0, but must be greater than 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, but"),
        ({"head_dim": 10}, "rope rotates 5 channels of a head, which must be even"),
        ({"attention_bias": 1}, "attention_bias is 1, but must be true or false"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    refused(tmp_path, {**GLM4, **changes}, told)


def test_gate_and_up_are_one_tensor(tmp_path: Path) -> None:
    found = read(tmp_path, GLM4)
    tensors = found.family.tensors(found.model, vocab_size=151552, seq_length=8)
    assert len(tensors) == 40 * 13 + 3  # 4 norms, 3 biases and 6 weights per layer
    shapes = {tensor.key.removeprefix("model.layers.39."): tensor.shape for tensor in tensors}
    assert shapes["mlp.gate_up_proj.weight"] == (2 * 13696, 4096)
    assert shapes["post_self_attn_layernorm.weight"] == (4096,)
    (fused,) = (x for x in tensors if x.key == "model.layers.0.mlp.gate_up_proj.weight")
    assert [x.name for x in fused.parts] == ["layers.0.mlp.gate.weight", "layers.0.mlp.up.weight"]
