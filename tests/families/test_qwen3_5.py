"""Qwen3-Next and Qwen3.5: their config.json, their joined tensors, and folders with images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.config import ModelConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.families.qwen3_next import QWEN3_NEXT
from cp_megatron.families.registry import read_hf_config, to_hf_config
from cp_megatron.model import Transformer
from cp_megatron.plan import Mask
from tests.families.case import VOCAB
from tests.families.literal import check, differs, read, refused
from tests.families.tiny_models import loud, make_config

# The dense form of the published Qwen3-Next-80B-A3B.
NEXT: Mapping[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "num_attention_heads": 16,
    "num_experts": 0,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
LINEAR, FULL = "linear_attention", "full_attention"
QWEN3_5: Mapping[str, Any] = {
    **{key: x for key, x in NEXT.items() if "mlp" not in key and "experts" not in key},
    "architectures": ["Qwen3_5ForCausalLM"],
    "attn_output_gate": True,
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * 2,
    "model_type": "qwen3_5_text",
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}


@pytest.mark.parametrize("config", [NEXT, QWEN3_5], ids=["next", "3.5"])
def test_config_json(config: Mapping[str, Any], tmp_path: Path) -> None:
    written = check(
        tmp_path,
        config,
        linear_attention_layers=(0, 1, 2, 4, 5, 6),
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        attention_output_gate=True,
        apply_layernorm_1p=True,
        rotary_percent=0.25,
    )
    assert written["layer_types"] == QWEN3_5["layer_types"]


def test_heads_for_further_tokens_are_told(tmp_path: Path) -> None:
    found = read(tmp_path, {**QWEN3_5, "mtp_num_hidden_layers": 1})
    assert found.unread == ("mtp_num_hidden_layers = 1",)


def test_layers_that_no_family_has(tmp_path: Path) -> None:
    model = read(tmp_path, QWEN3_5).model
    differs(replace(model, attention_output_gate=False), "--no-attention-output-gate")
    differs(replace(model, window_size=(8, 0)), "--window-size")
    every_second = replace(model, linear_attention_layers=None, linear_attention_freq=2)
    assert (
        to_hf_config(every_second, vocab_size=300, seq_length=8, eod=1)[1]["layer_types"]
        == [LINEAR, FULL] * 4
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"linear_num_value_heads": 24}, "a multiple of linear_num_key_heads 16"),
        ({"layer_types": ["sliding_attention"] * 8}, "full_attention, linear_attention"),
        ({"layer_types": [FULL]}, "a list of 8 entries"),
        ({"attn_output_gate": False}, "attn_output_gate"),
    ],
)
def test_refusals(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    refused(tmp_path, {**NEXT, **changes}, told)


def test_a_model_whose_experts_no_layer_has_is_dense(tmp_path: Path) -> None:
    dense = {"num_experts": 512, "mlp_only_layers": [*range(8)]}
    assert read(tmp_path, {**NEXT, **dense}).model == read(tmp_path, NEXT).model


def test_rows_of_the_folder_alternate_by_heads() -> None:
    """2 key heads of 3, 4 value heads of 2: a group is a key head and its 2 value heads."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        linear_attention_layers=(0,),
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=3,
        linear_value_head_dim=2,
        attention_output_gate=True,
        position_embedding_type="rope",
        normalization="RMSNorm",
        disable_bias_linear=True,
        qk_layernorm=True,
        swiglu=True,
    )
    tensors = QWEN3_NEXT.tensors(model, vocab_size=300, seq_length=8)
    rows = {
        tensor.key.removeprefix("model.layers."): [
            (part.name.split(".")[-2], part.start, part.start + part.shape[0])
            for part in tensor.parts
        ]
        for tensor in tensors
    }
    assert rows["0.linear_attn.in_proj_qkvz.weight"] == [
        *(("query", 0, 3), ("key", 0, 3), ("value", 0, 4), ("gate", 0, 4)),
        *(("query", 3, 6), ("key", 3, 6), ("value", 4, 8), ("gate", 4, 8)),
    ]
    assert rows["0.linear_attn.in_proj_ba.weight"] == [
        *(("rate", 0, 2), ("decay_input", 0, 2)),
        *(("rate", 2, 4), ("decay_input", 2, 4)),
    ]
    assert rows["1.self_attn.q_proj.weight"] == [
        *(("query", 0, 4), ("gate", 0, 4)),
        *(("query", 4, 8), ("gate", 4, 8)),
    ]
    conv = [("query_conv", 0, 6), ("key_conv", 0, 6), ("value_conv", 0, 8)]
    assert rows["0.linear_attn.conv1d.weight"] == conv
    assert "1.linear_attn.A_log" not in rows


def test_the_language_model_of_a_folder_with_images(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = make_config("qwen3_5_text").to_dict()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": text["hidden_size"]}
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=True
    )
    whole = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in whole.model.language_model.named_parameters():
            weight.copy_(loud(key, weight, one_plus=True, generator=generator))
    whole.save_pretrained(tmp_path)
    found = read_hf_config(tmp_path)
    assert found.is_part
    assert found.model.linear_layers == (1, 2)
    model = Transformer(
        found.model, seq_length=64, vocab_size=VOCAB, tp=None, sequence_parallel=False
    ).eval()
    load_hf(tmp_path, model=model)
    tokens = torch.randint(0, VOCAB, (1, 20), generator=generator)
    with torch.no_grad():
        ours = model(tokens, cp=ContextParallel(None, Mask.causal(20)))[..., :VOCAB]
        theirs = whole(input_ids=tokens).logits
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
