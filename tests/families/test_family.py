"""The tensors of a family: names, fusing, order and shapes, from the description of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cp_megatron.config.files.presets import PRESETS
from cp_megatron.families.family import Family
from cp_megatron.families.llama import LLAMA
from cp_megatron.families.llama_like import MODULES
from cp_megatron.families.registry import FAMILIES

MODEL = replace(
    PRESETS["toy"].model, num_layers=2, hidden_size=32, kv_channels=10, ffn_hidden_size=48
)
"""4 query heads and 2 key/value heads of 10 channels."""


def fused() -> Family:
    """Llama with one tensor for gate and up, and one transposed tensor for q, k and v."""
    heads = " ".join(f"layers.{{}}.attention.{name}" for name in ("query", "key", "value"))
    gone = ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj")
    modules = {key: ours for key, ours in MODULES.items() if not key.endswith(gone)}
    modules |= {
        "model.layers.{}.mlp.gate_up_proj": "layers.{}.mlp.gate layers.{}.mlp.up",
        "model.layers.{}.self_attn.qkv_proj": heads,
    }
    return replace(LLAMA, modules=modules, transposed=frozenset({"qkv_proj"}))


def test_a_family_may_fuse_and_transpose() -> None:
    model = replace(MODEL, disable_bias_linear=False)
    tensors = fused().tensors(model, vocab_size=300, seq_length=8)
    shapes = {tensor.key: tensor.shape for tensor in tensors}
    assert shapes["model.layers.1.mlp.gate_up_proj.weight"] == (96, 32)
    assert shapes["model.layers.1.mlp.gate_up_proj.bias"] == (96,)
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (32, 80)
    assert shapes["model.layers.0.self_attn.qkv_proj.bias"] == (80,)
    assert shapes["model.embed_tokens.weight"] == (300, 32)  # the padding is ours
    transposed = {tensor.key.split(".", 3)[3] for tensor in tensors if tensor.transposed}
    assert transposed == {"self_attn.qkv_proj.weight"}
    (qkv,) = (x for x in tensors if x.key == "model.layers.1.self_attn.qkv_proj.weight")
    names = [part.name for part in qkv.parts]
    assert names == [f"layers.1.attention.{name}.weight" for name in ("query", "key", "value")]
    assert [part.shape for part in qkv.parts] == [(40, 32), (20, 32), (20, 32)]


def test_a_tensor_of_the_folder_may_be_a_row_of_ours() -> None:
    norms = {
        "model.layers.{}.self_attn.q_layernorm.norms.{}": "layers.{}.attention.query_norm",
        "model.layers.{}.self_attn.k_layernorm.norms.{}": "layers.{}.attention.key_norm",
    }
    gone = ("q_norm", "k_norm")
    modules = {key: ours for key, ours in MODULES.items() if not key.endswith(gone)} | norms
    model = replace(MODEL, qk_layernorm=True, qk_norm_scope="each_head")
    tensors = replace(LLAMA, modules=modules).tensors(model, vocab_size=300, seq_length=8)
    rows = {tensor.key: tensor for tensor in tensors if tensor.is_row}
    assert len(rows) == 2 * (4 + 2)
    row = rows["model.layers.1.self_attn.q_layernorm.norms.3.weight"]
    (part,) = row.parts
    assert (row.shape, part.shape, part.start) == ((10,), (1, 10), 3)
    assert part.name == "layers.1.attention.query_norm.weight"


def test_a_parameter_beside_modules_belongs_to_the_module_around_them() -> None:
    modules = {**MODULES, "model.layers.{}.self_attn": "layers.{}.attention"}
    model = replace(MODEL, softmax_type="learnable")
    tensors = replace(LLAMA, modules=modules).tensors(model, vocab_size=300, seq_length=8)
    shapes = {tensor.key: tensor.shape for tensor in tensors}
    assert shapes["model.layers.1.self_attn.sinks"] == (4,)
    with pytest.raises(AssertionError, match="names every parameter once"):
        LLAMA.tensors(model, vocab_size=300, seq_length=8)


def test_tensors_follow_the_table_layer_by_layer() -> None:
    keys = [x.key for x in LLAMA.tensors(MODEL, vocab_size=300, seq_length=8)]
    layers = [key.split(".")[2] for key in keys if "layers" in key]
    assert layers == ["0"] * 9 + ["1"] * 9
    assert (keys[0], keys[-1]) == ("model.embed_tokens.weight", "model.norm.weight")
    untied = replace(MODEL, untie_embeddings_and_output_weights=True)
    assert LLAMA.tensors(untied, vocab_size=300, seq_length=8)[-1].key == "lm_head.weight"


def test_a_table_that_names_no_place_for_a_parameter_is_a_bug() -> None:
    family = replace(LLAMA, modules={"model.embed_tokens": "embedding", "model.norm": "norm"})
    with pytest.raises(AssertionError, match="llama names every parameter"):
        family.tensors(MODEL, vocab_size=300, seq_length=8)


def test_config_json_names_each_family_once() -> None:
    for names in zip(*((family.model_type, family.architecture) for family in FAMILIES)):
        assert len(set(names)) == len(FAMILIES)
