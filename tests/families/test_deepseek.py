"""DeepSeek V2 and V3: what their config.json sets, and what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.families.literal import check, differs, read, refused

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE: dict[str, Any] = {
    **V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "num_hidden_layers": 1,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": {**V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
    "vocab_size": 102400,
}


def test_the_dense_layers_of_v3(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        V3,
        multi_latent_attention=True,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
        head_dim=192,
        num_kv_heads=128,
        qk_layernorm=True,
        latent_epsilon=1e-6,
        rotary_interleaved=True,
        mscale_all_dim=1.0,
        softmax_scale=None,
        has_qkv_bias=False,
    )
    # m = 0.1 ln 40 + 1; m^2 / sqrt(192)
    assert read(tmp_path, V3).model.score_scale == pytest.approx(0.135234, rel=1e-5)
    same = {
        *("first_k_dense_replace", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim"),
        *("qk_rope_head_dim", "v_head_dim", "attention_bias", "num_nextn_predict_layers"),
        *("rms_norm_eps", "num_key_value_heads", "max_position_embeddings"),
    }
    assert {key: written[key] for key in same} == {key: V3[key] for key in same}
    assert (written["head_dim"], written["rope_interleave"]) == (64, True)
    rope = {**V3["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000, "truncate": True}
    assert written["rope_parameters"] == {key: rope[key] for key in rope.keys() - {"type"}}


def test_the_norms_of_latents_have_an_epsilon_of_their_own(tmp_path: Path) -> None:
    written = check(
        tmp_path, {**V3, "rms_norm_eps": 1e-5}, norm_epsilon=1e-5, latent_norm_epsilon=1e-6
    )
    assert written["rms_norm_eps"] == 1e-5
    model = replace(read(tmp_path, V3).model, latent_norm_epsilon=1e-5)
    differs(model, "--latent-norm-epsilon")


def test_both_kinds_of_pairs_of_v3_and_its_biases(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        {**V3, "rope_interleave": False, "attention_bias": True},
        rotary_interleaved=False,
        add_qkv_bias=True,
        add_attention_output_bias=True,
        has_mlp_bias=False,
    )
    assert (written["rope_interleave"], written["attention_bias"]) == (False, True)


def test_v2_reads_what_v3_reads_and_may_have_biases_in_the_mlp(tmp_path: Path) -> None:
    found = read(tmp_path, V2_LITE)
    model = found.model
    assert (model.q_lora_rank, model.head_dim, model.rotary_interleaved) == (None, 192, True)
    # m = 0.0707 ln 40 + 1 = 1.260804; m^2 / sqrt(192)
    assert model.score_scale == pytest.approx(0.114721, rel=1e-5)
    written = check(tmp_path, {**V2_LITE, "mlp_bias": True}, has_mlp_bias=True, has_qkv_bias=False)
    assert written["mlp_bias"] is True
    assert written["q_lora_rank"] is None


def test_the_latent_and_the_rotated_channels_are_one_tensor(tmp_path: Path) -> None:
    for entries, queries in (
        (V3, {"q_a_proj", "q_a_layernorm", "q_b_proj"}),
        (V2_LITE, {"q_proj"}),
    ):
        found = read(tmp_path, entries)
        tensors = found.family.tensors(found.model, vocab_size=found.vocab_size, seq_length=8)
        block = {x.key.split(".")[-2]: x for x in tensors if "layers.0.self_attn" in x.key}
        latent = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
        assert block.keys() == queries | latent
        assert block["kv_a_proj_with_mqa"].shape == (512 + 64, found.model.hidden_size)
        assert block["kv_b_proj"].shape == (found.model.num_attention_heads * 256, 512)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"first_k_dense_replace": None}, "first_k_dense_replace is null, but must be the number"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, .* has keys of its own"),
        ({"head_dim": 192}, "head_dim is 192, which is not supported"),
        ({"qk_head_dim": 64}, "qk_head_dim is 64, which is not supported"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, but must be even"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0, but must be a whole number"),
        ({"rope_interleave": 1}, "rope_interleave is 1, but must be true or false"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    refused(tmp_path, {**V3, **changes}, told)
