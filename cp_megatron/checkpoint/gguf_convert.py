"""Converts a GGUF file to a Hugging Face folder: weights, configuration, tokenizer.

The package transformers decodes the tensors and builds the tokenizer. This module corrects what
transformers 5.24 gets wrong:

* config.json: it ignores ``rope.scaling``, ``attention.key_length``, experts and windows, and takes
  the number of tokens for the rows of the embedding;
* tokenizer.json: it cuts every text by GPT-2's rule if it does not know the rule that the file
  names, as for SmolLM, and it omits Qwen2's Unicode normalisation;
* it skips a tensor that it does not know, such as the scaled frequencies of Llama 3.1.

llama.cpp rotates neighbouring channels, Hugging Face channel i with i + d/2, so the file of a llama
has the rows of each head of q and k in another order than the folder (d = 8, row numbers of the
folder). transformers undoes it. Other architectures keep their order.

    in the file     0 4 1 5 2 6 3 7      [d/2 pairs, 2]
    in the folder   0 1 2 3 4 5 6 7      [2, d/2]
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cp_megatron.checkpoint.gguf import FLAG, GGUFFile
from cp_megatron.errors import ConfigError

WeightType = Literal["float32", "bfloat16"]

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_TENSORS = re.compile(
    r"(token_embd|output_norm|output)\.weight"
    r"|blk\.\d+\.(attn_(norm|q|k|v|output|q_norm|k_norm)|ffn_(norm|gate|up|down))\.(weight|bias)"
)

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **options}


def _split(pattern: str) -> tuple[dict[str, Any], ...]:
    split = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Split", **split}, _byte_level(use_regex=False)


# How a text is cut before the merges: the rules of llama.cpp's source by the name that a file gives
# (tokenizer.ggml.pre), in the words of tokenizer.json.
_GPT2 = (_byte_level(use_regex=True),)
_PRE_TOKENIZERS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": ({"type": "Digits", "individual_digits": True}, *_GPT2),
    "qwen2": _split(_QWEN2_PATTERN),
    "llama-bpe": _split(_LLAMA3_PATTERN),
}


def convert_gguf(source: Path | str, output: Path | str, *, dtype: WeightType = "float32") -> Path:
    """Writes the folder ``output``, which gets its name when it is complete.

    Args:
        source: a GGUF file of the architecture llama, qwen2 or qwen3, any quantisation.
        output: a folder that does not exist.
        dtype: of the weights.

    Returns:
        ``output``.

    Raises:
        ConfigError: a package is missing, the file is damaged or holds a model that cannot be
            converted, or the output exists or cannot be written.
    """
    output = Path(output)
    check_output(output)
    file = GGUFFile.open(source)
    config = _config(file, dtype)
    texts = {
        **_tokenizer_files(file, config),
        "config.json": config,
        "generation_config.json": {"_from_model_config": True, **_token_ids(file)},
    }
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name, value in texts.items():
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        _write_weights(temporary / "model.safetensors", file, config, dtype)
        temporary.rename(output)
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError("--output", output, rule, "another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def check_output(output: Path) -> None:
    """Refuses a path that exists.

    Raises:
        ConfigError: it does.
    """
    if os.path.lexists(output):
        raise ConfigError("--output", output, "exists, and nothing is overwritten", "a new folder")


@contextmanager
def _library_errors(file: GGUFFile) -> Iterator[None]:
    """transformers does not check what it reads: a damaged file raises any error, anywhere."""
    try:
        yield
    except (ConfigError, OSError):
        raise
    except Exception as error:
        rule = f"transformers cannot read it: {type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(FLAG, file.path, rule, "pip install --upgrade transformers") from error


def _write_weights(
    path: Path, file: GGUFFile, config: Mapping[str, Any], dtype: WeightType
) -> None:
    import torch
    from safetensors.torch import save_file

    from cp_megatron.model.transformers_library import gguf_tensors

    for name in file.shapes:
        if not _TENSORS.fullmatch(name):
            rule = f"has the tensor {name}, which {config['model_type']} has no place for here"
            raise ConfigError(FLAG, file.path, rule)
    with _library_errors(file):
        tensors, shapes = gguf_tensors(file.path, config)
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    for name, shape in shapes.items():
        if name not in tensors:
            raise ConfigError(FLAG, file.path, f"lacks {name}")
        if tuple(tensors[name].shape) != shape:
            rule = f"{name} is {list(tensors[name].shape)}, its metadata makes it {list(shape)}"
            raise ConfigError(FLAG, file.path, rule)
        if not tensors[name].isfinite().all():
            raise ConfigError(FLAG, file.path, f"is damaged: {name} is not finite")
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    if len(tensors) != len(shapes) or len(tensors) != len(file.shapes):
        rule = f"has {len(file.shapes)} tensors, {config['model_type']} {len(shapes)}"
        raise ConfigError(FLAG, file.path, rule)
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(path.parent / "config.json", path)  # safetensors lets only the owner read


class _Metadata:
    """The metadata of the model, checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            rule = f"is of the architecture {self.architecture}, which is not converted"
            raise self.refused(rule, ", ".join(_ARCHITECTURES))
        for key in ("expert_count", "attention.sliding_window", "rope.scaling.attn_factor"):
            if self.get(key):
                raise self.refused(f"has {key}, which is not converted")
        if self.get("attention.causal") is False:
            raise self.refused("attends in both directions, which is not converted")

    def refused(self, rule: str, works: str = "") -> ConfigError:
        return ConfigError(FLAG, self.file.path, rule, works)

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise self.refused(f"has {self.architecture}.{key} {value}, must be a number above 0")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if not isinstance(value, float) or not 0 < value < 1e30:
            raise self.refused(f"has {self.architecture}.{key} {value}, must lie in 0 to 1e30")
        # The shortest number of this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value)))

    def head_dim(self) -> int:
        usual = max(1, self.whole("embedding_length") // self.whole("attention.head_count"))
        size = self.whole("attention.key_length", usual)
        if size % 2 or self.whole("rope.dimension_count", size) != size:
            raise self.refused(f"rotates a part of each head's {size} channels, not converted")
        return size

    def layers(self) -> int:
        layers = self.whole("block_count")
        if layers > len(self.file.shapes):
            raise self.refused(f"has {len(self.file.shapes)} tensors for {layers} layers")
        return layers

    def rope_scaling(self) -> dict[str, Any] | None:
        """Linear scaling as llama.cpp reads it: the type may be missing, the factor has 2 names."""
        keys = ("rope.scaling.factor", "rope.scale_linear")
        given = [key for key in keys if self.get(key) is not None]
        kind = self.get("rope.scaling.type", "linear" if given else "none")
        if kind not in ("none", "linear"):
            raise self.refused(f"scales its positions by {kind}, not converted", "none, linear")
        if kind == "none":
            return None
        return {"rope_type": "linear", "factor": self.real(given[0], 1.0) if given else 1.0}


def _config(file: GGUFFile, dtype: WeightType) -> dict[str, Any]:
    """config.json, with the rotary settings in the words of both transformers 4 and 5."""
    model = _Metadata(file)
    embedding = file.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise model.refused("has no token_embd.weight")
    scaling, theta = model.rope_scaling(), model.real("rope.freq_base", 10000.0)
    llama = model.architecture == "llama"
    return {
        "architectures": [_ARCHITECTURES[model.architecture]],
        "model_type": model.architecture,
        "hidden_size": model.whole("embedding_length"),
        "intermediate_size": model.whole("feed_forward_length"),
        "num_hidden_layers": model.layers(),
        "num_attention_heads": model.whole("attention.head_count"),
        # transformers does not restore the order of q and k if the file omits this number.
        "num_key_value_heads": model.whole("attention.head_count_kv"),
        "head_dim": model.head_dim(),
        "vocab_size": embedding[0],
        "max_position_embeddings": model.whole("context_length"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": theta},
        "rms_norm_eps": model.real("attention.layer_norm_rms_epsilon", 1e-5),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "initializer_range": 0.02,
        "torch_dtype": dtype,
        "use_cache": True,
        **({"mlp_bias": False} if llama else {"use_sliding_window": False}),
        **_token_ids(file),
    }


def _token_ids(file: GGUFFile) -> dict[str, int]:
    """``bos_token_id`` and so on, those that the file names."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {
        ours: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for ours, name in names.items()
    }
    return {ours: number for ours, number in ids.items() if number is not None}


def _tokenizer_files(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of tokenizer.json, tokenizer_config.json and special_tokens_map.json by name.

    Only byte-level BPE is converted, which GPT-2, SmolLM, Qwen2 and Llama 3 use.
    """
    from cp_megatron.model.transformers_library import gguf_tokenizer

    special = _special_tokens(file, config["vocab_size"])
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        rule = f"its tokenizer cuts text by the rule {pre}, which is not known here"
        raise ConfigError(FLAG, file.path, rule, ", ".join(_PRE_TOKENIZERS))
    with _library_errors(file):
        text, template = gguf_tokenizer(file.path)
    body = json.loads(text)
    body["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    body["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]}
    body["model"]["ignore_merges"] = pre == "llama-bpe"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **special,
        **({"chat_template": template} if template else {}),
    }
    return {
        "tokenizer.json": body,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
    }


def _special_tokens(file: GGUFFile, vocab_size: int) -> dict[str, str]:
    """``bos_token`` and so on, those that the file names; checks the vocabulary."""
    data, path = file.metadata, file.path
    kind, tokens = data.get("tokenizer.ggml.model", "none"), data.get("tokenizer.ggml.tokens")
    if kind != "gpt2":
        rule = f"its tokenizer is of the kind {kind}, only byte-level BPE (gpt2) is converted"
        raise ConfigError(FLAG, path, rule, "the model's own Hugging Face folder")
    if not isinstance(tokens, list) or not 0 < len(tokens) == len({*tokens}) <= vocab_size:
        raise ConfigError(FLAG, path, f"its tokens are not 1 to {vocab_size} different ones")
    special = {}
    for name, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = data.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise ConfigError(FLAG, path, f"is damaged: its {name} token is {number}")
        if number is not None:
            special[f"{ours}_token"] = tokens[number]
    return special
