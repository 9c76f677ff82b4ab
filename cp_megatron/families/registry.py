"""All families, and the choice between them: by config.json, or by the flags of a model.

To export a model, each family writes its config.json and reads it back. The first one that
reproduces every flag is used, so no flag is lost silently. A model that was loaded has the family
of its folder tried before the others.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cp_megatron.config.fields import settings
from cp_megatron.config.schema import ModelConfig
from cp_megatron.errors import ConfigError
from cp_megatron.families.cohere import COHERE, COHERE2
from cp_megatron.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from cp_megatron.families.exaone4 import EXAONE4
from cp_megatron.families.family import Family
from cp_megatron.families.gemma import GEMMA
from cp_megatron.families.gemma2 import GEMMA2
from cp_megatron.families.gemma3 import GEMMA3
from cp_megatron.families.glm import GLM, GLM4
from cp_megatron.families.glm4_moe import GLM4_MOE
from cp_megatron.families.gpt2 import GPT2
from cp_megatron.families.gpt_oss import GPT_OSS
from cp_megatron.families.granite import GRANITE, GRANITE_HYBRID, GRANITE_MOE
from cp_megatron.families.internlm3 import INTERNLM3
from cp_megatron.families.json_fields import JsonFields, read_json
from cp_megatron.families.llama import LLAMA
from cp_megatron.families.llama_like import window_width
from cp_megatron.families.ministral import MINISTRAL
from cp_megatron.families.ministral3 import MINISTRAL3
from cp_megatron.families.mistral import MISTRAL
from cp_megatron.families.mixtral import MIXTRAL
from cp_megatron.families.mixture import BALANCE_FIELDS, flags_of
from cp_megatron.families.olmo2 import OLMO2, OLMO3
from cp_megatron.families.olmoe import OLMOE
from cp_megatron.families.phi3 import PHI3
from cp_megatron.families.qwen2 import QWEN2
from cp_megatron.families.qwen3 import QWEN3
from cp_megatron.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from cp_megatron.families.qwen3_moe import QWEN3_MOE
from cp_megatron.families.qwen3_next import LINEAR_SIZES, QWEN3_NEXT
from cp_megatron.families.refusals import alternative_of, unknown_architecture
from cp_megatron.families.rope_fields import ROPE_FIELDS, ROTARY_FIELDS, unread_fields
from cp_megatron.families.smollm3 import SMOLLM3
from cp_megatron.families.stablelm import STABLELM
from cp_megatron.families.unread_keys import RecordedKeys, unread_keys

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    QWEN2,
    QWEN3,
    MISTRAL,
    GPT2,
    MINISTRAL,
    MINISTRAL3,
    SMOLLM3,
    INTERNLM3,
    GLM,
    GLM4,
    COHERE,
    COHERE2,
    STABLELM,
    PHI3,
    OLMO2,
    OLMO3,
    EXAONE4,
    GRANITE,
    GRANITE_HYBRID,
    GEMMA,
    GEMMA2,
    GEMMA3,
    DEEPSEEK_V3,
    DEEPSEEK_V2,
    QWEN3_5,
    QWEN3_NEXT,
    QWEN3_5_MOE,
    QWEN3_MOE,
    MIXTRAL,
    OLMOE,
    GRANITE_MOE,
    GLM4_MOE,
    GPT_OSS,
)
"""A model that several families can express is exported as ``hf_model_type`` says, or else as the
first of them."""
TRAINING_ONLY = BALANCE_FIELDS | frozenset(
    {"hidden_dropout", "attention_dropout", "init_method_std"}
    | {"make_vocab_size_divisible_by", "max_position_embeddings", "hf_model_type"}
)
"""Flags that do not change what a trained model computes for the sequences it is made for."""
_PART = "text_config"
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
"""The keys of quantized weights: of transformers, compressed-tensors and MLX."""
_BIASES: Mapping[str, str] = {
    "add_qkv_bias": "has_qkv_bias",
    "add_attention_output_bias": "has_attention_output_bias",
    "add_mlp_bias": "has_mlp_bias",
}
LATENT_WIDTHS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")
"""The fields of ``ModelConfig`` that are read only with ``multi_latent_attention``, as are the
norms of latents with their ``latent_norm_epsilon``."""


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """A model that config.json describes.

    Attributes:
        folder: the folder of config.json.
        family: the architecture that config.json names.
        model: its flags.
        vocab_size: rows of the embedding.
        raw: all entries of config.json.
        is_part: the folder's class is the container of the family's, and only its language model
            is read.
        unread: ``key = value`` of entries that the model does without (``unread_keys.py``).
    """

    folder: str
    family: Family
    model: ModelConfig
    vocab_size: int
    raw: Mapping[str, Any]
    is_part: bool = False
    unread: tuple[str, ...] = ()


def read_hf_config(folder: str | Path) -> HFModel:
    """Reads the model of a Hugging Face folder from its config.json.

    Raises:
        ConfigError: config.json is missing or malformed, or asks for something that is not
            supported.
    """
    entries = RecordedKeys(read_json(Path(folder)))
    fields = JsonFields(Path(folder), entries)
    if part := _container(fields):
        entries = RecordedKeys(part)
        fields = JsonFields(Path(folder), entries, prefix=f"{_PART}.")
    family = _family_named(fields)
    for key in _QUANTIZED:
        fields.only(key, works="weights that are not quantized")
    fields.only("is_causal", True, why="a token then reads those that follow it")
    alternative = alternative_of(family)
    fields = replace(fields, defaults=family.defaults, alternative=alternative)
    model = replace(family.read(fields), hf_model_type=family.model_type)
    return HFModel(
        folder=str(folder),
        family=family,
        model=model,
        vocab_size=fields.size("vocab_size"),
        raw=fields.value,
        is_part=part is not None,
        unread=unread_keys(entries),
    )


def _container(fields: JsonFields) -> dict[str, Any] | None:
    """The entries of the language model in a config.json of a family's container; None in others.

    The container decides whether the tables of the embedding and of the output layer are one.
    """
    for family in FAMILIES:
        if family.container and fields.value.get("architectures") == [family.container]:
            inner, tied = fields.inner(_PART), "tie_word_embeddings"
            entries = {**inner.value, "architectures": [family.architecture]}
            return entries | {
                key: x for key, x in fields.value.items() if key in (tied, *_QUANTIZED)
            }
    return None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer that can be read."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _family_named(fields: JsonFields) -> Family:
    key, known = "architectures", {family.architecture: family for family in FAMILIES}
    names = fields.value.get(key)
    if names is None:
        key, known = "model_type", {family.model_type: family for family in FAMILIES}
        names = [fields.value.get(key)]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.wrong(key, "but must name one architecture", ", ".join(known))
    if names[0] not in known:
        raise unknown_architecture(fields, key, names[0], ", ".join(known))
    kind = fields.value.get("model_type")
    special = [x for x in FAMILIES if x.model_type == kind and names[0] in x.classes]
    family = special[0] if special else known[names[0]]
    if kind not in (None, family.model_type):
        rule = f"but architectures names {names[0]}, and transformers builds what model_type says"
        raise fields.wrong("model_type", rule, family.model_type)
    return family


def check_model_type(model: ModelConfig, *, seq_length: int, is_asked: bool) -> None:
    """Checks ``hf_model_type``.

    Args:
        model: the model.
        seq_length: length of the rows it is trained on, in tokens.
        is_asked: the user typed the name. Otherwise it is that of the folder of ``--load-hf``, and
            other flags may have made another family's model of it.

    Raises:
        ConfigError: no family has this name, or the family that was asked for has no such model.
    """
    flag, name = "--hf-model-type", model.hf_model_type
    known = {family.model_type: family for family in FAMILIES}
    if name is not None and name not in known:
        raise ConfigError(flag, name, "is not supported", ", ".join(known))
    if name is None or not is_asked:
        return
    misfits = []
    with contextlib.suppress(ConfigError):  # the model is impossible, which other checks report
        misfits = _misfits(model, known[name], _entries(model, known[name], 1, seq_length, None))
    if misfits:
        differing, ours, theirs = misfits[0]
        rule = f"has no model with {spelled(differing, ours)}"
        raise ConfigError(flag, name, rule, f"{spelled(differing, theirs)}, or no {flag}")


def to_hf_config(
    model: ModelConfig, *, vocab_size: int, seq_length: int, eod: int | None, dtype: str = "float32"
) -> tuple[Family, dict[str, Any]]:
    """Chooses the family of a model, and makes its config.json.

    Args:
        model: the model.
        vocab_size: number of its tokens; the padding of the vocabulary is not exported.
        seq_length: length of the rows it was trained on, in tokens.
        eod: id of the token that ends a document.
        dtype: type of the weights.

    Raises:
        ConfigError: no Hugging Face architecture has such a model.
    """
    misfits: dict[str, list[tuple[str, Any, Any]]] = {}
    refusal = ""
    for family in sorted(FAMILIES, key=lambda x: x.model_type != model.hf_model_type):
        entries = _entries(model, family, vocab_size, seq_length, eod) | {"torch_dtype": dtype}
        try:
            misfits[family.architecture] = _misfits(model, family, entries)
        except ConfigError as error:  # the family cannot have such sizes
            refusal = refusal or error.rule
            continue
        if not misfits[family.architecture]:
            return family, entries
    if not misfits:
        rule = f"no supported Hugging Face architecture can have it: {refusal}"
        raise ConfigError("model", "", rule)
    # Of families with as few misfits, the last one is the most specific.
    nearest = min(reversed(misfits), key=lambda name: len(misfits[name]))
    name, ours, theirs = misfits[nearest][0]
    flag, _, value = spelled(name, ours).partition(" ")
    rule = "no supported Hugging Face architecture has such a model; the nearest one, "
    raise ConfigError(flag, value, f"{rule}{nearest}, differs in this flag", spelled(name, theirs))


def _entries(
    model: ModelConfig, family: Family, vocab_size: int, seq_length: int, eod: int | None
) -> dict[str, Any]:
    """config.json of the model in a family, without the type of the weights."""
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(model, max(seq_length, model.max_position_embeddings or 0)),
        "vocab_size": vocab_size,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": None,
        "eos_token_id": eod,
        "pad_token_id": None,
        "use_cache": True,
    }


def _misfits(
    model: ModelConfig, family: Family, entries: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Flags that the family does not express, each with its value and the family's."""
    read = family.read(JsonFields(Path(), entries, defaults=family.defaults))
    theirs = _flags(read)
    misfits = [
        (name, value, theirs[name])
        for name, value in _flags(model).items()
        if not _is_same(value, theirs[name]) and not (value is None and name in ROPE_FIELDS)
    ]  # rope's fields that are None are derived
    switches = (model.disable_bias_linear, read.disable_bias_linear)
    if misfits and misfits[0][0] in _BIASES and switches[0] != switches[1]:
        misfits[0] = ("disable_bias_linear", *switches)
    hidden, heads = model.hidden_size, model.num_attention_heads
    if family.heads_divide_hidden_size and hidden % heads:
        misfits.append(("hidden_size", hidden, max(1, hidden // heads) * heads))
    return misfits


def _is_same(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal. Numbers may differ by the rounding of a reciprocal, because
    some folders hold the reciprocal of a factor of ours."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-12)
    return bool(ours == theirs)


def _flags(model: ModelConfig) -> dict[str, Any]:
    """The flags that decide what a model computes, by name, with defaults filled in and those
    without effect None."""
    flags = {name: value for name, value in vars(model).items() if name not in TRAINING_ONLY}
    flags["vocab_size"] = None  # the tokenizer may decide it
    flags["disable_bias_linear"] = None  # the rows of ``_BIASES`` say more
    flags |= {name: getattr(model, has) for name, has in _BIASES.items()}
    flags |= {"ffn_hidden_size": model.ffn_size, "num_query_groups": model.num_kv_heads}
    flags |= {"kv_channels": model.head_dim, "v_head_dim": model.value_dim}
    flags |= {"softmax_scale": model.score_scale, "latent_norm_epsilon": model.latent_epsilon}
    if not model.qk_layernorm and model.norm_bias == "residual":
        flags["norm_bias"] = "all"  # there are no others
    flags["original_max_position_embeddings"] = model.original_length
    flags["rotary_percent"] = model.rotary_dim / model.head_dim
    flags["no_rope_layers"] = tuple(sorted(model.no_rope_layers or ())) or None
    width, layers = window_width(model), range(model.num_layers)
    flags["linear_attention_layers"] = model.linear_layers or None
    windows = tuple(n for n in layers if width and model.layer_window(n))
    flags["window_size"] = (width - 1, 0) if width and windows else None
    flags["window_layers"] = windows if 0 < len(windows) < len(layers) else None
    is_scaled = model.rope_type != "default"
    if not windows or (model.window_rotary_base == model.rotary_base and not is_scaled):
        flags["window_rotary_base"] = None
    return flags | dict(flags_of(model)) | dict.fromkeys(_unread(model))


def _unread(model: ModelConfig) -> Iterator[str]:
    """The flags that have no effect because of others."""
    if model.position_embedding_type == "rope":
        yield from unread_fields(model)
    else:
        yield from (*ROPE_FIELDS, *ROTARY_FIELDS, "rope_type", "rotary_base")
    if not model.multi_latent_attention:
        yield from (*LATENT_WIDTHS, "latent_norm_epsilon")
    yield "linear_attention_freq"  # ``linear_attention_layers`` says as much
    if not model.has_linear_layers:
        yield from LINEAR_SIZES
    if not model.qk_layernorm or model.multi_latent_attention:
        yield "qk_norm_scope"
    if model.normalization != "LayerNorm":
        yield "norm_bias"
    if not model.is_gated:
        yield from ("activation_func_clamp_value", "glu_linear_offset")


def spelled(name: str, value: object) -> str:
    """The words of the command line that give a setting this value."""
    row = settings()[name]
    if value is None:
        return f"no {row.flag}"
    if isinstance(value, bool):
        return row.flag if value else row.off_flag
    return " ".join([row.flag, *map(str, value if isinstance(value, tuple) else (value,))])
