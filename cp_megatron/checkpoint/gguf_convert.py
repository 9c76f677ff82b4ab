"""A GGUF file as a Hugging Face folder: weights, configuration, tokenizer. Nothing imports torch.

Tensors map one to one. The one that changes is q and k of the llama architecture: llama.cpp rotates
neighbouring channels, Hugging Face channel i with i + d/2, so its converter has reordered the rows
of each head, and here that is undone (d = 8, row numbers of Hugging Face):

    in the file     0 4 1 5 2 6 3 7      [d/2 pairs, 2]
    in the folder   0 1 2 3 4 5 6 7      [2, d/2]

Forgetting it is no error anywhere: the model still speaks, with a perplexity of 344 instead of 10.
The file has no such order for qwen2 and qwen3, whose rotation llama.cpp computes as it is trained.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt

from cp_megatron.checkpoint.gguf import FLAG, GGUFFile, TensorInfo
from cp_megatron.checkpoint.gguf_tokenizer import tokenizer_files
from cp_megatron.errors import ConfigError

WeightType = Literal["float32", "bfloat16"]

WEIGHTS = "model.safetensors"
_SAFETENSORS_NAMES: Mapping[WeightType, tuple[str, int]] = {
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
}
_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
_BLOCK: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The model's sizes, as its metadata has them and its tensors agree."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    rope_base: float
    epsilon: float
    vocab_size: int
    tied: bool
    scaling: float | None


def convert_gguf(source: Path | str, output: Path | str, *, dtype: WeightType = "float32") -> Path:
    """Writes the folder ``output``; complete when it has its name. One tensor is in memory.

    Args:
        source: a GGUF file of the architecture llama, qwen2 or qwen3, any quantisation.
        output: a folder that does not exist.
        dtype: of the weights; bfloat16 is rounded to nearest, ties to even.

    Returns:
        ``output``.

    Raises:
        ConfigError: the file is damaged or of a model that is not honoured, the output exists or
            can not be written.
    """
    output = Path(output)
    check_output(output)
    file = GGUFFile.open(source)
    shape = _read_shape(file)
    names = _map_names(file, shape)
    texts = tokenizer_files(file, vocab_size=shape.vocab_size)
    texts["config.json"] = _config(file, shape, dtype)
    texts["generation_config.json"] = {"_from_model_config": True, **_token_ids(file)}
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name, value in texts.items():
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        with (temporary / WEIGHTS).open("wb") as stream:
            _write_weights(stream, file, shape, names, dtype)
            os.fsync(stream.fileno())
        temporary.rename(output)
    except OSError as error:
        rule = f"can not be written: {error.strerror}"
        raise ConfigError("--output", output, rule, "another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def check_output(output: Path) -> None:
    """Raises:
    ConfigError: something lies there, which would be overwritten.
    """
    if os.path.lexists(output):
        rule = "is there already, and nothing is overwritten"
        raise ConfigError("--output", output, rule, "a new folder")


def _write_weights(
    stream: BinaryIO,
    file: GGUFFile,
    shape: _Shape,
    names: Mapping[str, str],
    dtype: WeightType,
) -> None:
    """A safetensors file (https://github.com/huggingface/safetensors): header, then the data."""
    kind, width = _SAFETENSORS_NAMES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for ours, theirs in names.items():
        dims = file.tensors[theirs].shape
        end = place + math.prod(dims) * width
        header[ours] = {"dtype": kind, "shape": list(dims), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for theirs in names.values():
        values = file.read(theirs)
        if not np.isfinite(values).all():
            raise ConfigError(FLAG, file.path, f"is damaged: {theirs} is not finite")
        values = _in_our_order(values, theirs, shape)
        stream.write((values if dtype == "float32" else to_bfloat16(values)).tobytes())


def _in_our_order(
    values: npt.NDArray[np.float32], name: str, shape: _Shape
) -> npt.NDArray[np.float32]:
    """Undoes the order of q and k rows of the llama architecture."""
    part = name.split(".")[-2]
    if shape.architecture != "llama" or part not in ("attn_q", "attn_k"):
        return values
    heads = shape.heads if part == "attn_q" else shape.kv_heads
    # [n * d, ..] -> [n, d/2, 2, ..] -> [n, 2, d/2, ..] -> [n * d, ..]
    pairs = values.reshape(heads, shape.head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float32's bits, rounded to nearest, ties to even; values finite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return cast(npt.NDArray[np.uint16], (rounded >> 16).astype(np.uint16))


def _read_shape(file: GGUFFile) -> _Shape:
    data, path = file.metadata, file.path
    architecture = data.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        rule = f"is of the architecture {architecture}, which is not converted"
        raise ConfigError(FLAG, path, rule, ", ".join(_ARCHITECTURES))
    for key in ("expert_count", "attention.sliding_window", "rope.scaling.attn_factor"):
        if data.get(f"{architecture}.{key}"):
            raise ConfigError(FLAG, path, f"has {key}, which is not converted")
    if data.get(f"{architecture}.attention.causal") is False:
        raise ConfigError(FLAG, path, "attends in both directions, which is not converted")

    def number(key: str, default: int | None = None) -> int:
        value = data.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            rule = f"has {architecture}.{key} {value}, which must be a number above 0"
            raise ConfigError(FLAG, path, rule)
        return value

    def real(key: str, default: float) -> float:
        value = data.get(f"{architecture}.{key}", default)
        if not isinstance(value, float) or not 0 < value < 1e30:
            rule = f"has {architecture}.{key} {value}, which must lie in 0 to 1e30"
            raise ConfigError(FLAG, path, rule)
        # The shortest number of this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value)))

    heads = number("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(FLAG, path, "has no token_embd.weight")
    shape = _Shape(
        architecture=architecture,
        layers=number("block_count"),
        hidden=number("embedding_length"),
        ffn=number("feed_forward_length"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", max(1, number("embedding_length") // heads)),
        positions=number("context_length"),
        rope_base=real("rope.freq_base", 10000.0),
        epsilon=real("attention.layer_norm_rms_epsilon", 1e-5),
        vocab_size=embedding.shape[0],
        tied="output.weight" not in file.tensors,
        scaling=_linear_scaling(file, real),
    )
    if shape.layers > len(file.tensors):
        rule = f"has {len(file.tensors)} tensors for {shape.layers} layers"
        raise ConfigError(FLAG, path, rule)
    if shape.head_dim % 2 or number("rope.dimension_count", shape.head_dim) != shape.head_dim:
        rule = f"rotates a part of each head's {shape.head_dim} channels, which is not converted"
        raise ConfigError(FLAG, path, rule)
    return shape


def _linear_scaling(file: GGUFFile, real: Any) -> float | None:
    """The factor, as llama.cpp reads it: without a type it is linear, and it has an older name."""
    architecture = file.metadata["general.architecture"]
    names = [x for x in _FACTORS if f"{architecture}.{x}" in file.metadata]
    usual = "linear" if names else "none"
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", usual)
    if kind == "none":
        return None
    if kind != "linear":
        rule = f"scales its positions by {kind}, which is not converted"
        raise ConfigError(FLAG, file.path, rule, "none, linear")
    return cast(float, real(names[0], 1.0)) if names else 1.0


def _map_names(file: GGUFFile, shape: _Shape) -> dict[str, str]:
    """Name in the folder -> name in the file, for every tensor; none is missing, none left over."""
    wanted = _wanted(shape)
    for theirs, tensor in file.tensors.items():
        if theirs not in wanted:
            rule = f"has the tensor {theirs}, which {shape.architecture} has no place for here"
            raise ConfigError(FLAG, file.path, rule)
        _check_dims(file.path, tensor, wanted[theirs][1])
    missing = [theirs for theirs in wanted if theirs not in file.tensors]
    if missing:
        rule = f"lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        raise ConfigError(FLAG, file.path, rule)
    return {ours: theirs for theirs, (ours, _) in wanted.items()}


def _check_dims(path: Path, tensor: TensorInfo, dims: tuple[int, ...]) -> None:
    if tensor.shape != dims:
        rule = f"{tensor.name} is {list(tensor.shape)}, its metadata makes it {list(dims)}"
        raise ConfigError(FLAG, path, rule)


def _wanted(shape: _Shape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the file -> name in the folder and shape."""
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norm: tuple[int, ...] = (shape.hidden,)
    parts: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": norm,
        "attn_q.weight": (width, shape.hidden),
        "attn_k.weight": (kv_width, shape.hidden),
        "attn_v.weight": (kv_width, shape.hidden),
        "attn_output.weight": (shape.hidden, width),
        "ffn_norm.weight": norm,
        "ffn_gate.weight": (shape.ffn, shape.hidden),
        "ffn_up.weight": (shape.ffn, shape.hidden),
        "ffn_down.weight": (shape.hidden, shape.ffn),
    }
    if shape.architecture == "qwen2":
        parts |= {"attn_q.bias": (width,), "attn_k.bias": (kv_width,), "attn_v.bias": (kv_width,)}
    if shape.architecture == "qwen3":
        parts |= {f"attn_{part}_norm.weight": (shape.head_dim,) for part in "qk"}
    table = {
        "token_embd.weight": (shape.vocab_size, shape.hidden),
        "output_norm.weight": norm,
    }
    if not shape.tied:
        table["output.weight"] = (shape.vocab_size, shape.hidden)
    wanted = {theirs: (_OUTER[theirs], dims) for theirs, dims in table.items()}
    for layer in range(shape.layers):
        for name, dims in parts.items():
            part, _, kind = name.partition(".")
            ours = f"model.layers.{layer}.{_BLOCK[part]}.{kind}"
            wanted[f"blk.{layer}.{name}"] = ours, dims
    return wanted


def _config(file: GGUFFile, shape: _Shape, dtype: WeightType) -> dict[str, Any]:
    """config.json, rotary positions in the words of transformers 4 and 5."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if shape.scaling is not None:
        rope = {"rope_type": "linear", "factor": shape.scaling}
    return {
        "architectures": [_ARCHITECTURES[shape.architecture]],
        "model_type": shape.architecture,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.rope_base,
        "rope_scaling": None if shape.scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": shape.rope_base},
        "rms_norm_eps": shape.epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied,
        "initializer_range": 0.02,
        "torch_dtype": dtype,
        "use_cache": True,
        **({"mlp_bias": False} if shape.architecture == "llama" else {"use_sliding_window": False}),
        **_token_ids(file),
    }


def _token_ids(file: GGUFFile) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {ours: file.metadata.get(f"tokenizer.ggml.{x}_token_id") for ours, x in names.items()}
    return {ours: number for ours, number in found.items() if number is not None}
