"""GGUF to a Hugging Face folder. The package gguf writes the files, from models of transformers."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cp_megatron.checkpoint.convert import Conversion
from cp_megatron.checkpoint.gguf import GGUFFile
from cp_megatron.checkpoint.gguf_convert import convert_gguf
from cp_megatron.errors import ConfigError
from tests.data.tokenizer_files import train_byte_level

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = ("Hello, it's 2024!  ", "naïve \u4f60\u597d \U0001f600\n\n x==y", "<|end|>a<|end|> 1234567")
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def tiny_model(kind: str, **changes: Any) -> Any:
    """A random model of transformers."""
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config_class, model_class = classes[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, "initializer_range": 0.2, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # gives norms and biases distinct values too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def gguf_name(name: str) -> str:
    body, _, kind = name.removeprefix("model.").rpartition(".")
    if not body.startswith("layers."):
        return f"{PARTS[body]}.{kind}"
    _, layer, part = body.split(".", 2)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def in_the_order_of_llama_cpp(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorders the rows of each head from halves to pairs, as LlamaModel.permute of llama.cpp."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def trained_tokenizer(folder: Path, *, individual_digits: bool) -> Any:
    """A byte-level BPE of 300 tokens; id 0 ends a text."""
    texts = ["the cat sat on the mat, 2024 times 2024"] * 3
    library = train_byte_level(texts, folder / "tok.json", vocab_size=300, special=["<|end|>"])
    (folder / "tok.json").unlink()
    if individual_digits:  # after training: the vocabulary has merges of digits to be ignored
        cut = tokenizers.pre_tokenizers
        digits = cut.Digits(individual_digits=True)
        library.pre_tokenizer = cut.Sequence([digits, library.pre_tokenizer])
    return library


def write_gguf(
    path: Path,
    model: Any,
    *,
    kind: str,
    tokenizer: Any = None,
    quantize: Callable[[str], Any] = lambda name: None,
    permute: bool = True,
    extra_tensor: str | None = None,
    **more: Any,
) -> Path:
    """Writes the model as the converter of llama.cpp does."""
    writer = gguf.GGUFWriter(path, kind)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if more.pop("num_kv_heads", 0) is not None:
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind == "qwen3":
        writer.add_key_length(config.head_dim)
    tokenizer = tokenizer or trained_tokenizer(path.parent, individual_digits=True)
    body = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(body["vocab"], key=body["vocab"].get)
    writer.add_tokenizer_model(more.pop("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(more.pop("pre", "smollm"))
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in body["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}!")
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in more.items():
        adders[type(value)](key.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if permute and kind == "llama" and part in name:
                values = in_the_order_of_llama_cpp(values, heads)
        stored = quantize(gguf_name(name)) if values.ndim == 2 else None
        if stored is not None:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, stored), raw_dtype=stored)
        else:
            writer.add_tensor(gguf_name(name), values)
    if extra_tensor is not None:
        writer.add_tensor(extra_tensor, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(40)[None] * 7 % 300).logits
    return found


def load(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_same_model(kind: str, tied: bool, tmp_path: Path) -> None:
    changes = {"head_dim": 32} if kind == "qwen3" else {}
    model = tiny_model(kind, tie_word_embeddings=tied, **changes)
    write_gguf(tmp_path / "m.gguf", model, kind=kind)
    found = load(convert_gguf(tmp_path / "m.gguf", tmp_path / "hf"))
    ours, theirs = found.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(found), logits(model))
    assert type(found) is type(model)
    assert not list(tmp_path.glob("hf.tmp*"))


def test_q_and_k_in_the_wrong_order_are_another_model(tmp_path: Path) -> None:
    """Shows that the test above notices a wrong order."""
    model = tiny_model("llama")
    write_gguf(tmp_path / "m.gguf", model, kind="llama", permute=False)
    found = load(convert_gguf(tmp_path / "m.gguf", tmp_path / "hf"))
    assert (logits(found) - logits(model)).norm() > 0.1 * logits(model).norm()


def test_quantised_and_bfloat16(tmp_path: Path) -> None:
    model = tiny_model("llama")
    kinds = gguf.GGMLQuantizationType

    def quantize(name: str) -> Any:
        if "embd" in name:
            return kinds.Q8_0
        return {"attn_v": kinds.F16, "ffn_up": kinds.BF16}.get(name.split(".")[-2], kinds.Q4_1)

    path = write_gguf(tmp_path / "m.gguf", model, kind="llama", quantize=quantize)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    whole = load(convert_gguf(path, tmp_path / "whole")).state_dict()
    for name, values in whole.items():
        if not any(part in name for part in ("q_proj", "k_proj", "lm_head")):  # the order of rows
            tensor = stored[gguf_name(name)]
            decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(values.numpy(), decoded)
    convert_gguf(path, tmp_path / "half", dtype="bfloat16")
    report = Conversion(folder=tmp_path / "half").report()
    assert "LlamaForCausalLM, safetensors in bfloat16\n" in report
    assert f" {sum(x.numel() for x in model.parameters()):,} parameters, " in report
    half = load(tmp_path / "half").state_dict()
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, value in whole.items():
        assert torch.equal(half[name], value.bfloat16().float())


@pytest.mark.parametrize("digits", [True, False])
def test_the_tokenizer_gives_the_same_ids(digits: bool, tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(tmp_path, individual_digits=digits)
    write_gguf(
        tmp_path / "m.gguf",
        tiny_model("llama"),
        kind="llama",
        tokenizer=tokenizer,
        pre="smollm" if digits else "gpt-2",
    )
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    found = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = found(text).input_ids
        assert ids == tokenizer.encode(text).ids
        assert found.decode(ids) == text
    assert found.eos_token_id == 0
    assert len(found("<|end|>").input_ids) == 1
    chat = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(chat, tokenize=False) == "hi!"


def test_qwen2_cuts_text_as_transformers_does(tmp_path: Path) -> None:
    body = json.loads(trained_tokenizer(tmp_path, individual_digits=False).to_str())["model"]
    merges = [tuple(pair) for pair in body["merges"]]
    theirs = transformers.Qwen2Tokenizer(vocab=body["vocab"], merges=merges)
    write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), kind="qwen2", pre="qwen2")
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    ours = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend = theirs.backend_tokenizer
    for text in (*TEXTS, "I'LL don't\r\n\r\n  tabs\t\tand e\u0301 12345"):
        cut = ours.pre_tokenizer.pre_tokenize_str(text)
        assert cut == backend.pre_tokenizer.pre_tokenize_str(text)
        form = ours.normalizer.normalize_str(text)
        assert form == backend.normalizer.normalize_str(text)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kind": "gpt2"}, "architecture gpt2"),
        ({"tokenizer_model": "llama"}, "tokenizer is of the kind llama"),
        ({"pre": "unheard-of"}, "unheard-of"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__attention__causal": False}, "attends in both directions"),
        ({"llama__rope__dimension_count": 8}, "rotates a part"),
        ({"llama__attention__key_length": 24}, "its metadata makes it"),
        ({"tokenizer__ggml__bos_token_id": 999}, "transformers cannot read it"),
        ({"extra_tensor": "rope_freqs.weight"}, "has the tensor rope_freqs.weight"),
        ({"num_kv_heads": None}, "lacks attention.head_count_kv"),
    ],
)
def test_models_that_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    options = {"kind": "llama", **changes}
    write_gguf(path, tiny_model("llama"), **options)
    with pytest.raises(ConfigError, match=word) as refused:
        convert_gguf(path, tmp_path / "hf")
    assert refused.value.flag == "--from-gguf"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("name", ["llama__rope__scaling__factor", "llama__rope__scale_linear"])
def test_a_factor_without_a_type_is_linear(name: str, tmp_path: Path) -> None:
    # https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp, load_hparams
    more: dict[str, Any] = {name: 4.0}
    write_gguf(tmp_path / "m.gguf", tiny_model("llama"), kind="llama", **more)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = tiny_model(
        "llama",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    path = write_gguf(folder / "m.gguf", model, kind="llama")
    return folder, path.read_bytes()


@settings(
    max_examples=60, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(small: tuple[Path, bytes], data: st.DataObject) -> None:
    """Any bytes give an error of ours or a folder, in little time, and no temporary folder."""
    folder, whole = small
    header = whole.index(b"token_embd.weight") + 4000
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, min(header, len(whole) - 1)))
        damaged[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(whole)))]
    (folder / "damaged.gguf").write_bytes(damaged)
    shutil.rmtree(folder / "out", ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused = None
        try:
            convert_gguf(folder / "damaged.gguf", folder / "out")
        except ConfigError as error:
            refused = error
    assert (folder / "out").is_dir() == (refused is None)
    assert refused is None or refused.flag == "--from-gguf"
    assert not list(folder.glob("out.tmp*"))


@pytest.mark.parametrize("size", [1, 3, 4, 20, 24, 200])
def test_truncated_files(small: tuple[Path, bytes], size: int, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(small[1][:size])
    with pytest.raises(ConfigError, match=r"truncated|no GGUF"):
        GGUFFile.open(tmp_path / "cut.gguf")
    (tmp_path / "tail.gguf").write_bytes(small[1][:-4096])
    with pytest.raises(ConfigError, match="is truncated"):
        GGUFFile.open(tmp_path / "tail.gguf")


def test_counts_beyond_the_file_take_no_time(tmp_path: Path) -> None:
    key = b"a"
    pair = struct.pack("<Q", 1) + key + struct.pack("<IIQ", 9, 0, 1 << 60)
    for tail in (pair, struct.pack("<Q", 1 << 62)):
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + tail)
        with pytest.raises(ConfigError, match="truncated or damaged"):
            GGUFFile.open(path)


@pytest.mark.parametrize("package", ["gguf", "transformers"])
def test_a_missing_package_is_named_with_its_command(
    package: str, monkeypatch: pytest.MonkeyPatch, small: tuple[Path, bytes], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "m.gguf").write_bytes(small[1])
    with pytest.raises(ConfigError, match=f"package {package}.*pip install"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
