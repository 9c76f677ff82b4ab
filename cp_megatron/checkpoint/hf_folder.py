"""Checks the safetensors of a Hugging Face folder, and describes them as a checkpoint of ours.

A folder holds one ``model.safetensors``, or several shards and an index that says which shard holds
which tensor. Only headers are read here, but all of them, so that a missing shard, a truncated
file, or a tensor that is superfluous or has a wrong shape or dtype is found before a rank waits for
another one::

    model.layers.0.self_attn.q_proj.weight in model-00001-of-00002.safetensors
    -> model.layers.0.attention.query.weight, one chunk, read by every rank that holds a part of it

Our embedding has more rows, which pad the vocabulary; its chunk ends before them.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Collection, Mapping
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
from cp_megatron.families.family import HFTensor
from cp_megatron.families.json_fields import FLAG
from cp_megatron.families.registry import HFModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: Mapping[str, str] = MappingProxyType(
    {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
)
"""The dtypes that weights may have, by their names in safetensors."""
_MAX_HEADER_BYTES = 1 << 27
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
# A buffer that old versions of transformers stored. It follows from the flags.
_OLD_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a parameter of ours lies: from row ``start`` of what the tensor's parts make."""

    tensor: HFTensor
    start: int
    padded: bool


@dataclass(frozen=True, kw_only=True)
class HFWeights:
    """The weights of a folder, described as a checkpoint.

    Attributes:
        manifest: the files and the tensors, which have our names. If a tensor of the folder holds
            several of ours, each of them has a chunk with its key.
        sources: for each name in the manifest, the tensor of the folder.
    """

    manifest: Manifest
    sources: Mapping[str, Source]


def read_hf_weights(found: HFModel, model: ModelConfig, *, padded_vocab_size: int) -> HFWeights:
    """Checks the headers of all files of a folder against a model.

    Args:
        found: the folder's config.json.
        model: the model whose parameters are read; it may differ from ``found.model`` in flags
            that change no tensor.
        padded_vocab_size: rows of our embedding.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    folder = Path(found.folder)
    stored, files = _stored(folder)
    if model.num_layers > len(stored):
        rule = f"config.json says {model.num_layers} layers, but the folder has only {len(stored)} "
        raise _wrong(folder, f"{rule}tensors")
    positions = found.model.max_position_embeddings or 1
    tensors = found.family.tensors(model, vocab_size=found.vocab_size, seq_length=positions)
    described: dict[str, TensorEntry] = {}
    sources: dict[str, Source] = {}
    for tensor in tensors:
        at = _find(folder, stored, tensor)
        start = 0
        for part in tensor.parts:
            shape = (padded_vocab_size, *part.shape[1:]) if part.padded else part.shape
            chunk = ChunkEntry(
                offsets=(0,) * len(shape), sizes=part.shape, file=at.file, key=tensor.key
            )
            name = f"model.{part.name}"
            described[name] = TensorEntry(dtype=at.dtype, shape=shape, chunks=(chunk,))
            sources[name] = Source(tensor=tensor, start=start, padded=part.padded)
            start += part.shape[0]
    known = {tensor.key for tensor in tensors}
    if not model.untie_embeddings_and_output_weights:
        known.add("lm_head.weight")  # transformers ignores it and uses the embedding
    _refuse_extra(folder, stored, known)
    return HFWeights(manifest=_manifest(found, files, described), sources=sources)


def _find(folder: Path, stored: Mapping[str, _Stored], tensor: HFTensor) -> _Stored:
    if tensor.key not in stored:
        raise _wrong(folder, f"its safetensors lack {tensor.key}")
    at = stored[tensor.key]
    if at.shape != tensor.shape:
        rule = f"{at.file}: {tensor.key} has the shape {list(at.shape)}, but by config.json and "
        raise _wrong(folder, f"{rule}the flags it is {list(tensor.shape)}")
    return at


def _refuse_extra(folder: Path, stored: Mapping[str, _Stored], known: Collection[str]) -> None:
    extra = [key for key in stored if key not in known and not _OLD_BUFFER.fullmatch(key)]
    if extra:
        rule = f"{stored[extra[0]].file} holds {extra[0]}, which is not a tensor of the model in "
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise _wrong(folder, f"{rule}config.json{more}")


def _manifest(
    found: HFModel, files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]
) -> Manifest:
    return Manifest(
        version=FORMAT_VERSION,
        step=0,
        consumed=0,
        config={},
        data_fingerprint="",
        vocab_size=found.vocab_size,
        torch_version="",
        package_version="",
        grid={},
        optimizer_steps={},
        extra={},
        files=files,
        tensors=tensors,
    )


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A tensor as the header of its file describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def _stored(folder: Path) -> tuple[dict[str, _Stored], dict[str, FileEntry]]:
    """All tensors of the folder by key, and its files by name."""
    index = _index(folder)
    names = [SINGLE_FILE] if index is None else sorted(set(index.values()))
    stored: dict[str, _Stored] = {}
    files: dict[str, FileEntry] = {}
    for name in names:
        header, size = _header(folder, name)
        files[name] = FileEntry(size=size, sha256="")
        for key, tensor in header.items():
            if index is not None and index.get(key) != name:
                where = f"in {index[key]}" if key in index else "in no file"
                raise _wrong(folder, f"{name} holds {key}, which by {INDEX_FILE} is {where}")
            stored[key] = tensor
    for key, name in (index or {}).items():
        if key not in stored:
            raise _wrong(folder, f"{name} lacks {key}, which by {INDEX_FILE} is there")
    return stored, files


def _index(folder: Path) -> dict[str, str] | None:
    """The file of each key; None if the folder has a single file."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    document = _json(folder, INDEX_FILE, _read_index(folder))
    index = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(index, dict) or not index:
        raise _wrong(folder, f"{INDEX_FILE} has no weight_map")
    for key, name in index.items():
        # A name without a separator cannot lead out of the folder.
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            rule = f"{INDEX_FILE}: {str(name)[:80]!r} of {key} is not the name of a file beside it"
            raise _wrong(folder, rule)
    return index


def _read_index(folder: Path) -> bytes:
    path = folder / INDEX_FILE
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_HEADER_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise _wrong(folder, f"{INDEX_FILE} cannot be read ({error.strerror})") from None
    rule = f"{INDEX_FILE} is not a regular file of at most {_MAX_HEADER_BYTES} bytes"
    raise _wrong(folder, rule)


def _header(folder: Path, name: str) -> tuple[dict[str, _Stored], int]:
    """The tensors of a file, and its size: 8 bytes of length, the header as JSON, the numbers."""
    path = folder / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _wrong(folder, f"{name} is not a regular file")
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MAX_HEADER_BYTES, status.st_size - 8):
                raise _wrong(folder, f"{name} is truncated, or not a safetensors file")
            text = stream.read(length)
    except OSError as error:
        raise _wrong(folder, f"{name} is missing or cannot be read ({error.strerror})") from None
    document = _json(folder, name, text)
    if not isinstance(document, dict):
        raise _wrong(folder, f"{name} has no header")
    tensors: dict[str, _Stored] = {}
    spans: list[tuple[int, int]] = []
    for key, entry in document.items():
        if key != "__metadata__":
            tensors[key], span = _entry(folder, name, key, entry)
            spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _wrong(folder, f"{name} is malformed: its tensors overlap or leave a hole")
        end = stop
    if 8 + length + end != status.st_size:
        rule = f"{name} has {status.st_size} bytes, but {8 + length + end} by its header"
        raise _wrong(folder, f"{rule}: it is truncated or damaged")
    return tensors, status.st_size


def _entry(folder: Path, name: str, key: str, entry: Any) -> tuple[_Stored, tuple[int, int]]:
    malformed = _wrong(folder, f"{name}: the header of {key} is malformed")
    if not isinstance(entry, dict):
        raise malformed
    dtype, shape, span = entry.get("dtype"), _counts(entry, "shape"), _counts(entry, "data_offsets")
    if shape is None or span is None:
        raise malformed
    if not isinstance(dtype, str) or dtype not in DTYPES:
        rule = f"{name}: {key} has the dtype {str(dtype)[:20]}"
        raise ConfigError(FLAG, folder, rule, "weights in " + ", ".join(DTYPES.values()))
    size = math.prod(shape) * ELEMENT_BYTES[DTYPES[dtype]]
    if len(span) != 2 or span[1] - span[0] != size:
        raise malformed
    return _Stored(file=name, dtype=DTYPES[dtype], shape=shape), (span[0], span[1])


def _counts(entry: dict[str, Any], name: str) -> tuple[int, ...] | None:
    """A list of whole numbers of at least 0; None if the entry is something else."""
    values = entry.get(name)
    if not isinstance(values, list):
        return None
    valid = all(type(number) is int and 0 <= number < 1 << 62 for number in values)
    return tuple(values) if valid else None


def _json(folder: Path, name: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong(folder, f"{name} is malformed: it is not JSON") from None


def _wrong(folder: Path, rule: str) -> ConfigError:
    return ConfigError(FLAG, folder, rule)
