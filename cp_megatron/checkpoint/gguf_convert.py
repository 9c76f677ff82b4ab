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
folder). transformers undoes it. Other architectures keep their order. The norms of Gemma hold their
factors in the file, and the factors minus 1 in the folder; transformers subtracts it.

    in the file     0 4 1 5 2 6 3 7      [d/2 pairs, 2]
    in the folder   0 1 2 3 4 5 6 7      [2, d/2]
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from cp_megatron.checkpoint.gguf import FLAG, GGUFFile, shortest_float
from cp_megatron.checkpoint.gguf_gemma import GEMMAS, gemma_keys
from cp_megatron.checkpoint.hf_folder import SINGLE_FILE, check_output, new_folder
from cp_megatron.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

WeightType = Literal["float32", "bfloat16"]

# The architectures of GGUF, with the model type of config.json.
_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {x: x for x in ("llama", "qwen2", "qwen3", "gemma2")} | {"gemma3": "gemma3_text"}
)
_TENSORS = re.compile(
    r"(token_embd|output_norm|output)\.weight"
    r"|blk\.\d+\.(attn_(norm|q|k|v|output|q_norm|k_norm)|ffn_(norm|gate|up|down))\.(weight|bias)"
    r"|blk\.\d+\.post_(attention|ffw)_norm\.weight"
)

# The same entries of every config.json.
_SAID_BY_ALL: Mapping[str, Any] = MappingProxyType(
    {"attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02}
    | {"use_cache": True}
)
_WINDOW = "attention.sliding_window"
# Metadata that transformers ignores; files that contain it are refused.
_UNSUPPORTED = ("expert_count", "attention.sliding_window_pattern", "rope.scaling.attn_factor")
_SPECIAL_TOKENS: Mapping[str, str] = {"bos": "bos", "eos": "eos", "pad": "padding"}

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


_BYTE_LEVEL: Mapping[str, Any] = MappingProxyType(
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
)


def _split(pattern: str) -> tuple[dict[str, Any], ...]:
    split = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Split", **split}, {**_BYTE_LEVEL, "use_regex": False}


# How a text is cut before the merges: the rules of llama.cpp's source by the name that a file gives
# (tokenizer.ggml.pre), in the words of tokenizer.json.
_GPT2 = ({**_BYTE_LEVEL, "use_regex": True},)
_PRE_TOKENIZERS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": ({"type": "Digits", "individual_digits": True}, *_GPT2),
    "qwen2": _split(_QWEN2_PATTERN),
    "llama-bpe": _split(_LLAMA3_PATTERN),
}


def convert_gguf(source: Path | str, output: Path | str, *, dtype: WeightType = "float32") -> Path:
    """Writes the folder ``output``, which gets its name when it is complete, and returns it.

    Args:
        source: a GGUF file of the architecture llama, qwen2, qwen3, gemma2 or gemma3, any
            quantisation.
        output: a folder that does not exist.
        dtype: of the weights.

    Raises:
        ConfigError: a package is missing, the file is damaged or holds a model that cannot be
            converted, or the output exists or cannot be written.
    """
    output = Path(output)
    check_output(output)
    file = GGUFFile.open(source)
    from safetensors.torch import save_file  # imports torch

    try:
        config = _config(file, dtype)
        texts = _tokenizer_files(file, config)
        tensors = _weights(file, config, dtype)
    except ConfigError:
        raise
    except Exception as error:  # transformers does not check what it reads
        rule = f"transformers cannot read it: {type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(FLAG, file.path, rule, "pip install --upgrade transformers") from error
    generation = {"_from_model_config": True, **_token_ids(file)}
    texts |= {"config.json": config, "generation_config.json": generation}
    with new_folder(output) as folder:
        for name, value in texts.items():
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
        # safetensors lets only the owner read its file.
        shutil.copymode(folder / "config.json", folder / SINGLE_FILE)
    return output


def _weights(file: GGUFFile, config: Mapping[str, Any], dtype: WeightType) -> dict[str, Tensor]:
    """The tensors by their names in the folder, compared with the sizes in the metadata."""
    import torch

    from cp_megatron.model.transformers_library import gguf_tensors

    def refused(rule: str) -> ConfigError:
        return ConfigError(FLAG, file.path, rule)

    for name in file.shapes:
        if not _TENSORS.fullmatch(name):
            raise refused(f"has the tensor {name}, which {config['model_type']} has no place for")
    tensors, shapes = gguf_tensors(file.path, config)
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    for name, shape in shapes.items():
        if name not in tensors:
            raise refused(f"lacks {name}")
        actual = tuple(tensors[name].shape)
        if actual != shape:
            raise refused(f"{name} is {list(actual)}, its metadata makes it {list(shape)}")
        if not tensors[name].isfinite().all():
            raise refused(f"is damaged: {name} is not finite")
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    if not len(tensors) == len(shapes) == len(file.shapes):
        raise refused(f"has {len(file.shapes)} tensors, {config['model_type']} {len(shapes)}")
    return tensors


def _config(file: GGUFFile, dtype: WeightType) -> dict[str, Any]:
    """config.json, with the rotary settings in the words of both transformers 4 and 5."""
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        rule = f"is of the architecture {architecture}, which is not converted"
        raise ConfigError(FLAG, file.path, rule, ", ".join(_ARCHITECTURES))
    prefix = f"{architecture}."
    model = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    hidden, heads = model["embedding_length"], model["attention.head_count"]
    head_dim = model.get("attention.key_length", hidden // heads)
    _refuse_unsupported(file, model, head_dim)
    theta, scaling = shortest_float(model.get("rope.freq_base", 10000.0)), _rope_scaling(model)
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    own: dict[str, Any] = {"hidden_act": "silu"}
    if architecture in GEMMAS:
        own = gemma_keys(architecture, model, head_dim=head_dim, rope=rope)
    elif architecture == "llama":
        own["mlp_bias"] = False
    else:
        own["use_sliding_window"] = False
    return {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": _ARCHITECTURES[architecture],
        "hidden_size": hidden,
        "intermediate_size": model["feed_forward_length"],
        "num_hidden_layers": model["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": model["attention.head_count_kv"],
        "head_dim": head_dim,
        "vocab_size": file.shapes["token_embd.weight"][0],
        "max_position_embeddings": model["context_length"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "rms_norm_eps": shortest_float(model.get("attention.layer_norm_rms_epsilon", 1e-5)),
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "torch_dtype": dtype,
        **_SAID_BY_ALL,
        **own,
        **_token_ids(file),
    }


def _token_ids(file: GGUFFile) -> dict[str, int]:
    keys = {ours: f"tokenizer.ggml.{name}_token_id" for ours, name in _SPECIAL_TOKENS.items()}
    return {f"{x}_token_id": file.metadata[key] for x, key in keys.items() if key in file.metadata}


def _refuse_unsupported(file: GGUFFile, model: Mapping[str, Any], head_dim: int) -> None:
    """Refuses what transformers would ignore, and what would keep it busy for ever."""
    scaling = model.get("rope.scaling.type", "linear")
    rules = {f"has {key}": model.get(key) for key in _UNSUPPORTED}
    architecture, base = file.metadata["general.architecture"], model.get("rope.freq_base", 10000.0)
    is_gemma, window_base = architecture in GEMMAS, model.get("rope.freq_base_swa", base)
    rules |= {
        "rotates windows with another base": architecture != "gemma3" and window_base != base,
        f"{'lacks' if is_gemma else 'has'} {_WINDOW}": bool(model.get(_WINDOW)) != is_gemma,
        "attends in both directions": model.get("attention.causal") is False,
        f"scales its positions by {scaling}": scaling not in ("none", "linear"),
        f"rotates a part of each head's {head_dim} channels": head_dim % 2
        or model.get("rope.dimension_count", head_dim) != head_dim,
        # transformers would not restore the order of q and k.
        "lacks attention.head_count_kv": "attention.head_count_kv" not in model,
        f"has {len(file.shapes)} tensors for {model['block_count']} layers": model["block_count"]
        > len(file.shapes),
    }
    for rule, broken in rules.items():
        if broken:
            raise ConfigError(FLAG, file.path, f"{rule}, which is not converted")


def _rope_scaling(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Linear scaling as llama.cpp reads it: the type may be missing, the factor has two names."""
    factor = model.get("rope.scaling.factor", model.get("rope.scale_linear"))
    if model.get("rope.scaling.type", "linear" if factor else "none") == "none":
        return None
    return {"rope_type": "linear", "factor": shortest_float(factor or 1.0)}


def _tokenizer_files(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of tokenizer.json, tokenizer_config.json and special_tokens_map.json by name.

    Byte-level BPE is converted, which GPT-2, SmolLM, Qwen2 and Llama 3 use, and Gemma's BPE of
    SentencePiece, which transformers reads into its GemmaTokenizer.
    """
    from cp_megatron.model.transformers_library import gguf_tokenizer

    kind = file.metadata.get("tokenizer.ggml.model", "none")
    expected = "llama" if file.metadata["general.architecture"] in GEMMAS else "gpt2"
    if kind != expected:
        rule = f"its tokenizer is of the kind {kind}, but for its architecture only "
        rule += "SentencePiece (llama)" if expected == "llama" else "byte-level BPE (gpt2)"
        rule += " is converted"
        raise ConfigError(FLAG, file.path, rule, "the model's own Hugging Face folder")
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        rule = f"its tokenizer cuts text by the rule {pre}, which is not known here"
        raise ConfigError(FLAG, file.path, rule, ", ".join(_PRE_TOKENIZERS))
    tokens = file.metadata["tokenizer.ggml.tokens"]
    if not 0 < len(tokens) == len({*tokens}) <= config["vocab_size"]:
        rule = f"its tokens are not 1 to {config['vocab_size']} different ones"
        raise ConfigError(FLAG, file.path, rule)
    text, special, template = gguf_tokenizer(file.path)
    body = json.loads(text)
    if kind == "gpt2":
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
