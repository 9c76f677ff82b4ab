"""The safetensors of a Hugging Face folder, described as a checkpoint of ours. No torch.

A folder has one ``model.safetensors``, or shards and an index that says which tensor lies where.
Only headers are read here, and all of them, so that whatever is wrong is found before a rank waits
for another: a missing shard, a file cut short, a tensor too many, of another shape or dtype.

    model.layers.0.self_attn.q_proj.weight  of  model-00001-of-00002.safetensors
    -> model.layers.0.attention.query.weight, one chunk, read by whoever holds a part of it

The embedding has more rows here than there (the vocabulary's padding); the chunk ends before them.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cp_megatron.checkpoint.manifest import (
    ELEMENT_BYTES,
    FORMAT_VERSION,
    ChunkEntry,
    FileEntry,
    Manifest,
    TensorEntry,
)
from cp_megatron.config import ModelConfig
from cp_megatron.errors import ConfigError

FLAG = "--load-hf"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 1 << 27
DTYPES: Mapping[str, str] = MappingProxyType(
    {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
)
"""The dtypes of weights, as safetensors spells them."""
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
# Buffers of old versions that are worked out anew.
_PASSING = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """A tensor as Hugging Face names it, and its shape there."""

    key: str
    shape: tuple[int, ...]


def hf_tensors(model: ModelConfig, vocab_size: int) -> dict[str, HFTensor]:
    """Every parameter of a model by its name here.

    Args:
        model: of the Llama family.
        vocab_size: rows of the embedding there, without padding.
    """
    hidden = model.hidden_size
    table = vocab_size, hidden
    rows: list[tuple[str, str, tuple[int, ...]]]
    rows = [("embedding.weight", "model.embed_tokens.weight", table)]
    for layer in range(model.num_layers):
        for ours, theirs, shape in _layer(model):
            rows.append((f"layers.{layer}.{ours}", f"model.layers.{layer}.{theirs}", shape))
    rows.append(("norm.weight", "model.norm.weight", (hidden,)))
    if model.untie_embeddings_and_output_weights:
        rows.append(("head.weight", "lm_head.weight", table))
    return {ours: HFTensor(key=theirs, shape=shape) for ours, theirs, shape in rows}


def _layer(model: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    hidden, ffn = model.hidden_size, model.ffn_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    linears = [
        ("attention.query", "self_attn.q_proj", queries, hidden, model.has_qkv_bias),
        ("attention.key", "self_attn.k_proj", keys, hidden, model.has_qkv_bias),
        ("attention.value", "self_attn.v_proj", keys, hidden, model.has_qkv_bias),
        ("attention.out", "self_attn.o_proj", hidden, queries, not model.disable_bias_linear),
        ("mlp.gate", "mlp.gate_proj", ffn, hidden, not model.disable_bias_linear),
        ("mlp.up", "mlp.up_proj", ffn, hidden, not model.disable_bias_linear),
        ("mlp.down", "mlp.down_proj", hidden, ffn, not model.disable_bias_linear),
    ]
    for ours, theirs, width, inputs, bias in linears:
        yield f"{ours}.weight", f"{theirs}.weight", (width, inputs)
        if bias:
            yield f"{ours}.bias", f"{theirs}.bias", (width,)
    yield "attention_norm.weight", "input_layernorm.weight", (hidden,)
    yield "mlp_norm.weight", "post_attention_layernorm.weight", (hidden,)
    if model.qk_layernorm:
        yield "attention.query_norm.weight", "self_attn.q_norm.weight", (model.head_dim,)
        yield "attention.key_norm.weight", "self_attn.k_norm.weight", (model.head_dim,)


def read_hf_weights(
    folder: str | Path, model: ModelConfig, *, vocab_size: int, padded_vocab_size: int
) -> Manifest:
    """Checks all headers of a folder against a model, and describes what lies where.

    Args:
        folder: holds the safetensors.
        model: of its config.json.
        vocab_size: rows of the embedding there.
        padded_vocab_size: and here.

    Raises:
        ConfigError: with the file and what is wrong with it.
    """
    folder = Path(folder)
    stored, files = _stored(folder)
    if model.num_layers > len(stored):
        rule = f"config.json says {model.num_layers} layers, it stores {len(stored)} tensors in all"
        raise _wrong(folder, rule)
    tensors: dict[str, TensorEntry] = {}
    wanted = hf_tensors(model, vocab_size)
    for ours, tensor in wanted.items():
        if tensor.key not in stored:
            raise _wrong(folder, f"its safetensors lack {tensor.key}")
        found = stored[tensor.key]
        if found.shape != tensor.shape:
            rule = f"{found.file}: {tensor.key} is {list(found.shape)}, "
            raise _wrong(folder, rule + f"by config.json and the flags {list(tensor.shape)}")
        rows = ours in ("embedding.weight", "head.weight")
        shape = (padded_vocab_size, *tensor.shape[1:]) if rows else tensor.shape
        chunk = ChunkEntry(
            offsets=(0,) * len(shape), sizes=tensor.shape, file=found.file, key=tensor.key
        )
        tensors[f"model.{ours}"] = TensorEntry(dtype=found.dtype, shape=shape, chunks=(chunk,))
    _refuse_extra(folder, stored, {tensor.key for tensor in wanted.values()}, model)
    return Manifest(
        version=FORMAT_VERSION,
        step=0,
        consumed=0,
        config={},
        data_fingerprint="",
        vocab_size=vocab_size,
        torch_version="",
        package_version="",
        grid={},
        optimizer_steps={},
        extra={},
        files=files,
        tensors=tensors,
    )


def _refuse_extra(
    folder: Path, stored: Mapping[str, _Stored], wanted: set[str], model: ModelConfig
) -> None:
    # A tied head is the embedding, which transformers reads whatever else is stored.
    tied = set() if model.untie_embeddings_and_output_weights else {"lm_head.weight"}
    extra = [key for key in stored if key not in wanted | tied and not _PASSING.fullmatch(key)]
    if extra:
        rule = f"{stored[extra[0]].file} holds {extra[0]}, which its config.json has no place for"
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise _wrong(folder, rule + more)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    file: str
    dtype: str
    shape: tuple[int, ...]


def _stored(folder: Path) -> tuple[dict[str, _Stored], dict[str, FileEntry]]:
    """Every tensor of the folder by its key, and the files."""
    place = _index(folder)
    names = [SINGLE_FILE] if place is None else sorted(set(place.values()))
    stored: dict[str, _Stored] = {}
    files: dict[str, FileEntry] = {}
    for name in names:
        header, size = _header(folder, name)
        files[name] = FileEntry(size=size, sha256="")
        for key, tensor in header.items():
            if place is not None and place.get(key) != name:
                where = place.get(key, "nowhere")
                raise _wrong(folder, f"{name} holds {key}, which {INDEX_FILE} has {where}")
            stored[key] = tensor
    for key in place or ():
        if key not in stored:
            raise _wrong(folder, f"{(place or {})[key]} lacks {key}, which {INDEX_FILE} has there")
    return stored, files


def _index(folder: Path) -> dict[str, str] | None:
    """Key -> file of a sharded folder; None of one with a single file."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    document = _json(folder, INDEX_FILE, _bytes(folder, INDEX_FILE, MAX_HEADER_BYTES))
    place = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(place, dict) or not place:
        raise _wrong(folder, f"{INDEX_FILE} has no weight_map")
    for key, name in place.items():
        # A name without a separator can not lead out of the folder.
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise _wrong(folder, f"{INDEX_FILE}: {str(name)[:80]!r} of {key} is no file beside it")
    return place


def _header(folder: Path, name: str) -> tuple[dict[str, _Stored], int]:
    """The tensors of one file, and its size: 8 bytes of length, JSON, then the numbers."""
    path = folder / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _wrong(folder, f"{name} is not a regular file")
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(MAX_HEADER_BYTES, status.st_size - 8):
                raise _wrong(folder, f"{name} is truncated or no safetensors file")
            text = stream.read(length)
    except OSError as error:
        raise _wrong(folder, f"{name} is missing or can not be read ({error.strerror})") from None
    document = _json(folder, name, text)
    if not isinstance(document, dict):
        raise _wrong(folder, f"{name} has no header")
    entries = {key: value for key, value in document.items() if key != "__metadata__"}
    tensors: dict[str, _Stored] = {}
    spans: list[tuple[int, int]] = []
    for key, entry in entries.items():
        tensors[key], span = _entry(folder, name, key, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _wrong(folder, f"{name} is malformed: its tensors overlap or leave a hole")
        end = stop
    if 8 + length + end != status.st_size:
        rule = f"{name} has {status.st_size} bytes, its header says {8 + length + end}"
        raise _wrong(folder, f"{rule}: it is truncated or damaged")
    return tensors, status.st_size


def _entry(folder: Path, name: str, key: str, entry: Any) -> tuple[_Stored, tuple[int, int]]:
    bad = _wrong(folder, f"{name}: the header of {key} is malformed")
    if not isinstance(entry, dict):
        raise bad
    dtype, shape, span = entry.get("dtype"), _counts(entry, "shape"), _counts(entry, "data_offsets")
    if shape is None or span is None:
        raise bad
    if not isinstance(dtype, str) or dtype not in DTYPES:
        works = "weights in " + ", ".join(DTYPES.values())
        shown = str(dtype)[:20]
        raise ConfigError(FLAG, folder, f"{name}: {key} has the dtype {shown}", works)
    size = math.prod(shape) * ELEMENT_BYTES[DTYPES[dtype]]
    if len(span) != 2 or span[1] - span[0] != size:
        raise bad
    return _Stored(file=name, dtype=DTYPES[dtype], shape=shape), (span[0], span[1])


def _counts(entry: dict[str, Any], name: str) -> tuple[int, ...] | None:
    """Whole numbers from 0; None where there is something else."""
    values = entry.get(name)
    if not isinstance(values, list):
        return None
    fine = all(type(number) is int and 0 <= number < 1 << 62 for number in values)
    return tuple(values) if fine else None


def _bytes(folder: Path, name: str, most: int) -> bytes:
    try:
        status = (folder / name).stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= most:
            return (folder / name).read_bytes()
    except OSError as error:
        raise _wrong(folder, f"{name} can not be read ({error.strerror})") from None
    raise _wrong(folder, f"{name} is not a regular file of at most {most} bytes")


def _json(folder: Path, name: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong(folder, f"{name} is malformed: it is not JSON") from None


def _wrong(folder: Path, rule: str) -> ConfigError:
    return ConfigError(FLAG, folder, rule)
