"""Describes a checkpoint, and checks the description. This module does not import torch.

A checkpoint has a ``manifest.json`` and shards ``rank-00000.safetensors``. The manifest is not
trusted: every field is checked before it is used, and a name in it cannot lead out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from cp_megatron.checkpoint.step_folders import MANIFEST, finished_steps
from cp_megatron.errors import ConfigError

FLAG = "--load"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 30
SHARD_FILE = re.compile(r"rank-[0-9]{5,}\.safetensors")
_SURROGATE = re.compile("[\ud800-\udfff]")
_field_types = cache(get_type_hints)
_DTYPES = (
    *(("float64", "F64", 8), ("float32", "F32", 4), ("bfloat16", "BF16", 2), ("float16", "F16", 2)),
    *(("int64", "I64", 8), ("int32", "I32", 4), ("int16", "I16", 2), ("int8", "I8", 1)),
    *(("uint8", "U8", 1), ("bool", "BOOL", 1)),
)
ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({name: size for name, _, size in _DTYPES})
"""The dtypes that a checkpoint can hold, and the bytes of an element."""
DTYPE_CODES: Mapping[str, str] = MappingProxyType({name: code for name, code, _ in _DTYPES})
"""The names of these dtypes in the header of a safetensors file."""


class DamagedError(ConfigError):
    """A checkpoint that is incomplete or corrupt."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A shard's size in bytes and the SHA-256 (hex) of its contents."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ChunkEntry:
    """A box of a tensor, stored under ``key`` in the safetensors file ``file``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor's dtype (``float32``), its global shape and the chunks that fill it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint except the values of its tensors.

    Attributes:
        version: of this format.
        step: the number of training steps done.
        consumed: the number of rows that the run has used so far.
        vocab_size: of the tokenizer, without padding.
        grid: the sizes of the axes it was written on; it loads on any other grid.
        optimizer_steps: the number of updates of each parameter that has optimizer state.
        extra: other plain data that training needs to continue.
        tensors: ``model.<name>`` and ``optimizer.<name>.<moment>``.
    """

    version: int = FORMAT_VERSION
    step: int
    consumed: int
    config: Mapping[str, Any]
    data_fingerprint: str
    vocab_size: int
    torch_version: str
    package_version: str
    grid: Mapping[str, int]
    optimizer_steps: Mapping[str, int]
    extra: Mapping[str, Any]
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns the text of ``manifest.json``: the fields and their SHA-256."""
        fields = asdict(self)
        return _canonical({"manifest": fields, "sha256": _sha256(fields)}) + "\n"


def read_manifest(folder: Path | str) -> Manifest:
    """Reads and checks the manifest of a ``step-N``. The shards are not read.

    Raises:
        DamagedError: the manifest is missing, malformed or inconsistent, or names a file that is
            not a shard in this folder.
        ConfigError: the manifest has another version.
    """
    folder = Path(folder)
    document = _read_json(folder)
    fields = document.get("manifest") if isinstance(document, dict) else None
    if not isinstance(fields, dict):
        raise _malformed(folder, "manifest is missing or not valid")
    try:
        if document.get("sha256") != _sha256(fields):
            raise damaged(folder, f"{MANIFEST} is damaged: its SHA-256 does not match")
        version = _decode(int, fields.get("version"), "version")
        if version != FORMAT_VERSION:
            rule = f"has checkpoint format {version}, but this program reads {FORMAT_VERSION}"
            raise ConfigError(FLAG, folder, rule, "the version of the program that wrote it")
        manifest: Manifest = _decode(Manifest, fields, "")
    except RecursionError:
        raise _malformed(folder, "it is nested too deep") from None
    except _FieldError as error:
        raise _malformed(folder, f"{error} is missing or not valid") from None
    _check_consistent(folder, manifest)
    return manifest


def verify_files(folder: Path, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Compares the shards ``names``, by default all, with the manifest of their folder.

    Kind, size and SHA-256 are compared, at about 1.5 GB/s.

    Raises:
        DamagedError: a shard is missing or a link, or its size or contents differ.
    """
    for name in sorted(manifest.files if names is None else names):
        entry = manifest.files[name]
        check_size(folder, name, entry)
        try:
            digest = file_sha256(folder / name)
        except OSError as error:
            raise damaged(folder, f"{name} cannot be read ({error.strerror})") from None
        if digest != entry.sha256:
            raise damaged(folder, f"{name} is damaged: its SHA-256 differs from the manifest")


def check_size(folder: Path, name: str, entry: FileEntry) -> None:
    """Compares a shard's kind and size with the manifest, without reading its contents.

    Raises:
        DamagedError: the shard is missing or a link, or its size differs.
    """
    try:
        status = (folder / name).lstat()
    except OSError as error:
        raise damaged(folder, f"{name} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise damaged(folder, f"{name} is not a regular file")
    if status.st_size != entry.size:
        rule = f"{name} has {status.st_size} bytes, but the manifest says {entry.size}"
        raise damaged(folder, rule)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damaged(folder: Path, rule: str) -> DamagedError:
    """Returns the error for a damaged checkpoint; it suggests the run's newest other one."""
    others = {n: path for n, path in finished_steps(folder.parent).items() if path != folder}
    return DamagedError(FLAG, folder, rule, str(others[max(others)]) if others else "")


def _read_json(folder: Path) -> Any:
    path = folder / MANIFEST
    try:
        status = path.stat()
        # Reading a pipe would block, and reading a device would not end.
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_MANIFEST_BYTES:
            return json.loads(path.read_bytes())
    except OSError as error:
        rule = f"is not a finished checkpoint: {MANIFEST} cannot be read ({error.strerror})"
        raise damaged(folder, rule) from None
    except (ValueError, RecursionError):
        raise _malformed(folder, "it is not JSON") from None
    raise _malformed(folder, f"it is not a regular file of at most {MAX_MANIFEST_BYTES} bytes")


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _sha256(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(fields).encode()).hexdigest()


def _malformed(folder: Path, what: str) -> DamagedError:
    return damaged(folder, f"{MANIFEST} is malformed: {what}")


class _FieldError(Exception):
    """Names a field that is missing or has a wrong type."""


def _decode(kind: Any, value: Any, name: str) -> Any:
    """Converts JSON data to ``kind``: a dataclass above, or the type of one of its fields."""
    # In Python, but not in JSON, a bool is an int.
    if kind is Any or (kind is int and type(value) is int and 0 <= value < 1 << 63):
        return value
    # JSON can contain a lone surrogate, which no file name can hold.
    if kind is str and isinstance(value, str) and not _SURROGATE.search(value):
        return value
    arguments = get_args(kind)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], x, f"{name}.{n}") for n, x in enumerate(value))
    if get_origin(kind) is Mapping and isinstance(value, dict):
        return {key: _decode(arguments[1], x, f"{name}.{key}") for key, x in value.items()}
    if kind in (Manifest, FileEntry, TensorEntry, ChunkEntry) and isinstance(value, dict):
        kinds = _field_types(kind)
        if kind is Manifest:
            value = {"extra": {}, **value}  # older checkpoints do not have this field
        fields = {x: _decode(kinds[x], value.get(x), f"{name}.{x}" if name else x) for x in kinds}
        return kind(**fields)
    raise _FieldError(name)


def _check_consistent(folder: Path, manifest: Manifest) -> None:
    """Checks that the chunks of each tensor fill it exactly, and that their files can hold them."""
    held = dict.fromkeys(manifest.files, 0)
    for name in held:
        # The name has no separator and no leading dot, so it cannot lead out of the folder.
        if not SHARD_FILE.fullmatch(name):
            raise _malformed(folder, f"{name!r} is not the name of a shard")
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in ELEMENT_BYTES:
            raise _malformed(folder, f"{name} has the unknown dtype {tensor.dtype!r}")
        for chunk in tensor.chunks:
            if chunk.file not in held:
                raise _malformed(folder, f"{name} is stored in {chunk.file!r}, which is not listed")
            held[chunk.file] += math.prod(chunk.sizes) * ELEMENT_BYTES[tensor.dtype]
            if not _inside(chunk, tensor.shape):
                raise _malformed(folder, f"a chunk of {name} lies outside its shape")
        filled = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        corners = {chunk.offsets for chunk in tensor.chunks}
        disjoint = len(corners) == len(tensor.chunks) and not _overlap(tensor.chunks)
        if filled != math.prod(tensor.shape) or not disjoint:
            raise _malformed(folder, f"the chunks of {name} do not fill its shape")
    for file, size in held.items():
        if size > manifest.files[file].size:
            raise _malformed(folder, f"the tensors in {file} are larger than the file")


def _inside(chunk: ChunkEntry, shape: tuple[int, ...]) -> bool:
    return len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
        offset + size <= length for offset, size, length in zip(chunk.offsets, chunk.sizes, shape)
    )


def _overlap(chunks: Sequence[ChunkEntry]) -> bool:
    """Whether two chunks share an element. Sweeps along the dim with the most distinct offsets."""
    chunks = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    dims = range(len(chunks[0].sizes) if chunks else 0)
    dim = max(dims, key=lambda d: len({chunk.offsets[d] for chunk in chunks}), default=None)
    if dim is None:
        return len(chunks) > 1
    active: list[ChunkEntry] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[dim]):
        begin = chunk.offsets[dim]
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > begin]
        if any(_intersect(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _intersect(one: ChunkEntry, other: ChunkEntry) -> bool:
    return all(
        max(a, b) < min(a + length, b + width)
        for a, length, b, width in zip(one.offsets, one.sizes, other.offsets, other.sizes)
    )
