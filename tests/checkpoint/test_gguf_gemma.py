"""GGUF files of Gemma 2 and 3 to Hugging Face folders, with tokenizers that SentencePiece trained.

The files are like those of llama.cpp's converter: weights of norms have 1 added, and what llama.cpp
knows from the architecture alone is left out.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cp_megatron.checkpoint.gguf_convert import convert_gguf
from cp_megatron.checkpoint.gguf_gemma import gemma_keys
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import read_hf_config
from tests.checkpoint.test_gguf import PARTS, SIZES, load, logits, tiny_model, write_gguf

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TEXTS = (
    "the cat sat on the mat,  twice   as\tlong 2024",
    " lead and trail  ",
    "naïve \u4f60\u597d \U0001f600\n\n x==y\r\n",
)
WIDTH = 24  # of a head


@cache
def trained() -> Any:
    """A tokenizer of Gemma's kind: BPE, byte fallback, no dummy prefix, newlines as symbols."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, 2024 times  2024", "cats and mats"] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind_of(token: int) -> int:
    """The type of a token in GGUF."""
    library, kinds = trained(), gguf.TokenType
    if library.is_byte(token):
        return int(kinds.BYTE)
    if library.is_control(token) or library.is_unknown(token):
        return int(kinds.CONTROL)
    of_user = set(library.id_to_piece(token)) <= {"\n", "\u2581"} and token < 8
    return int(kinds.USER_DEFINED if of_user else kinds.NORMAL)


def gemma(kind: str, layers: int) -> Any:
    """A random model of transformers whose norms are exact after adding and subtracting 1."""
    sizes = {**SIZES, "head_dim": WIDTH, "num_hidden_layers": layers, "sliding_window": 8}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.2}
    if kind == "gemma3":
        rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
        sizes["rope_scaling"] = rope
    model = getattr(transformers, f"{kind.capitalize()}ForCausalLM")
    config = getattr(transformers, f"{kind.capitalize()}{'Text' * (kind == 'gemma3')}Config")
    torch.manual_seed(0)
    made = model(config(query_pre_attn_scalar=WIDTH, attn_implementation="eager", **sizes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randint(-16, 17, parameter.shape) / 32)
    return made.eval()


def write_gemma(path: Path, model: Any, kind: str, **more: Any) -> Path:
    """Writes the model, without its window if ``more`` has ``window=False``.

    ``tokenizer_model`` in ``more`` is the kind of the tokenizer.
    """
    config, writer = model.config, gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if more.pop("window", True):
        writer.add_sliding_window(config.sliding_window)
    if "window_base" in more:
        writer.add_float32(f"{kind}.rope.freq_base_swa", more.pop("window_base"))
    if kind == "gemma3":
        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    else:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    library, tokens = trained(), range(trained().vocab_size())
    pieces = [library.id_to_piece(token) for token in tokens]
    kinds = [kind_of(token) for token in tokens]
    writer.add_tokenizer_model(more.pop("tokenizer_model", "llama"))
    writer.add_tokenizer_pre("default")
    # llama.cpp's converter writes symbols of the user with spaces.
    writer.add_token_list(
        [
            piece.replace("\u2581", " ") if kind_ == gguf.TokenType.USER_DEFINED else piece
            for piece, kind_ in zip(pieces, kinds)
        ]
    )
    writer.add_token_scores([library.get_score(token) for token in tokens])
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            body, _, leaf = name.removeprefix("model.").rpartition(".")
            _, layer, part = body.split(".", 2) if body.startswith("layers.") else ("", "", body)
            theirs = {**PARTS, **NORMS}[part]
            key = f"blk.{layer}.{theirs}.{leaf}" if layer else f"{theirs}.{leaf}"
            writer.add_tensor(key, (tensor + 1 if "norm" in name else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("kind", "layers"), [("gemma2", 3), ("gemma3", 7)])
def test_transformers_loads_the_same_model(kind: str, layers: int, tmp_path: Path) -> None:
    model = gemma(kind, layers)
    folder = convert_gguf(write_gemma(tmp_path / "m.gguf", model, kind), tmp_path / "hf")
    found = load(folder)
    ours, theirs = found.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert type(found) is type(model)
    read = read_hf_config(folder)
    assert read.unread == ()
    assert read.model.window_rotary_base == (1e4 if kind == "gemma3" else None)


@pytest.mark.parametrize(
    ("kind", "layers", "scalar"),
    [("gemma2", 42, 128), ("gemma2", 46, 144), ("gemma3", 48, 128), ("gemma3", 62, 144)],
)
def test_the_largest_models_scale_their_scores_otherwise(
    kind: str, layers: int, scalar: int
) -> None:
    model = {"block_count": layers, "embedding_length": 4608, "attention.head_count": 32}
    keys = gemma_keys(kind, {**model, "attention.sliding_window": 8}, head_dim=128, rope={})
    assert keys["query_pre_attn_scalar"] == scalar


def test_the_rotary_base_of_windows_is_the_one_of_the_file(tmp_path: Path) -> None:
    path = write_gemma(tmp_path / "m.gguf", gemma("gemma3", 6), "gemma3", window_base=2e4)
    assert read_hf_config(convert_gguf(path, tmp_path / "hf")).model.window_rotary_base == 2e4
    path = write_gemma(tmp_path / "2.gguf", gemma("gemma2", 1), "gemma2", window_base=2e4)
    with pytest.raises(ConfigError, match="rotates windows with another base"):
        convert_gguf(path, tmp_path / "hf2")


def test_the_tokenizer_is_the_one_of_the_file(tmp_path: Path) -> None:
    """A tokenizer.json beside the file, which transformers would prefer, is not read."""
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}}}')
    model = gemma("gemma3", 1)
    folder = convert_gguf(write_gemma(tmp_path / "m.gguf", model, "gemma3"), tmp_path / "hf")
    found, library = transformers.AutoTokenizer.from_pretrained(folder), trained()
    for text in TEXTS:
        ids = found(text).input_ids
        assert ids == [2, *library.encode(text)]
        assert found.decode(ids, skip_special_tokens=True) == text
    assert (found.eos_token_id, found.pad_token_id) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"window": False}, "lacks attention.sliding_window"),
        ({"tokenizer_model": "gpt2"}, "kind gpt2, but for its architecture only SentencePiece"),
    ],
)
def test_models_that_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = write_gemma(tmp_path / "m.gguf", gemma("gemma3", 1), "gemma3", **changes)
    with pytest.raises(ConfigError, match=word) as refused:
        convert_gguf(path, tmp_path / "hf")
    assert refused.value.flag == "--from-gguf"


def test_a_llama_with_a_window_is_refused(tmp_path: Path) -> None:
    more: dict[str, Any] = {"llama__attention__sliding_window": 8}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), kind="llama", **more)
    with pytest.raises(ConfigError, match=r"has attention\.sliding_window, which is not converted"):
        convert_gguf(path, tmp_path / "hf")
