"""Reads a GGUF file: metadata at once, tensors one at a time. Nothing here imports torch.

The header is read by our own bounded reader: every length in it is compared with what is left of
the file before anything is made of it, so a damaged file is refused in milliseconds, whatever its
counts say. The package ``gguf`` knows what the blocks of each quantisation mean; its own reader of
headers takes seconds for a vocabulary and does not end for some damaged files.

    "GGUF" version  tensors  pairs | key type value ... | name dims type offset ... | pad | data
     4 B    u32      u64      u64

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError

FLAG = "--from-gguf"
WORKS = "a whole GGUF file, version 2 or 3"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
# uint8 int8 uint16 int16 uint32 int32 float32 bool, uint64 int64 float64; 8 and 9 are above.
_SCALARS: Mapping[int, str] = {
    **dict(enumerate("BbHhIif?")),
    **dict(enumerate("Qqd", start=10)),
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor in the file.

    Attributes:
        shape: outermost dim first, a matrix is [out, in].
        kind: GGML's number of the way its elements are stored.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A file whose header is sound.

    Attributes:
        metadata: the key-value pairs; arrays are lists.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path | str) -> GGUFFile:
        """Reads the header and compares every tensor's place with the file's size.

        Raises:
            ConfigError: the package gguf is missing, or the file is no whole GGUF file.
        """
        path = Path(path)
        library = _library()
        data = _map(path)
        with _user_errors(path):
            metadata, tensors = _read_header(data)
        for tensor in tensors.values():
            end = tensor.offset + _num_bytes(path, tensor, library)
            if end > len(data):
                rule = f"is truncated: {tensor.name} ends at byte {end} of {len(data)}"
                raise ConfigError(FLAG, path, rule, WORKS)
        return cls(path=path, metadata=metadata, tensors=tensors)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor's values, float32 of its shape; no other tensor is in memory.

        Raises:
            ConfigError: the installed gguf does not know the quantisation.
        """
        tensor, library = self.tensors[name], _library()
        size = _num_bytes(self.path, tensor, library)
        data = _map(self.path)[tensor.offset : tensor.offset + size]
        kind = library.GGMLQuantizationType(tensor.kind)
        rows = data.reshape(math.prod(tensor.shape[:-1]), -1)
        floats = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
        if kind.name in floats:
            values = data.view(floats[kind.name])
        else:
            try:
                values = library.dequantize(rows, kind)
            except NotImplementedError:
                rule = f"{name} is stored as {kind.name}, which gguf can not decode"
                raise ConfigError(FLAG, self.path, rule, "a file of another quantisation") from None
        return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)


def check_package() -> None:
    """Raises:
    ConfigError: the package gguf is missing.
    """
    _library()


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError:
        rule = "reading GGUF needs the package gguf"
        raise ConfigError(FLAG, "", rule, "pip install 'cp_megatron[hf]'") from None
    return gguf


def _map(path: Path) -> npt.NDArray[np.uint8]:
    """The file's bytes, uint8 [n], read when they are touched."""
    try:
        status = path.stat()
        # Reading a pipe would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(FLAG, path, "is no file", WORKS)
        if status.st_size == 0:
            raise ConfigError(FLAG, path, "is empty", WORKS)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        rule = f"can not be read: {error.strerror}"
        raise ConfigError(FLAG, os.fspath(path), rule, WORKS) from None


@contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _MalformedError as error:
        raise ConfigError(FLAG, path, str(error), WORKS) from None


def _num_bytes(path: Path, tensor: TensorInfo, library: ModuleType) -> int:
    try:
        block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError):
        rule = f"{tensor.name} has the type {tensor.kind}, which gguf does not know"
        raise ConfigError(FLAG, path, rule, "pip install --upgrade gguf") from None
    if tensor.shape[-1] % block:
        rule = f"{tensor.name} has rows of {tensor.shape[-1]} elements in blocks of {block}"
        raise ConfigError(FLAG, path, rule, WORKS)
    return int(math.prod(tensor.shape) // block * size)


# ---- the header ----------------------------------------------------------------------------------


class _MalformedError(Exception):
    """What is wrong with the file, as a clause."""


class _Cursor:
    """Reads on from a place in the file and never past its end."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data = memoryview(cast(Any, data))
        self.place = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.place:
            raise _MalformedError(
                f"is truncated or damaged: its header asks for {size} bytes at {self.place}, "
                f"the file has {len(self.data)}"
            )
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        try:
            return bytes(self.take(self.number("Q"))).decode("utf-8")
        except UnicodeDecodeError:
            raise _MalformedError(f"is damaged: the text at {self.place} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise _MalformedError(f"is damaged: at {self.place} is a value of type {kind}")
        return self.number(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[kind])
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * size)))
        if kind != _STRING:
            raise _MalformedError(f"has an array of type {kind}, which no converter writes")
        # A text is at least its length, so this many can not be there:
        if count * 8 > len(self.data) - self.place:
            raise _MalformedError(f"is truncated or damaged: {count} texts at {self.place}")
        return [self.text() for _ in range(count)]


def _read_header(
    data: npt.NDArray[np.uint8],
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    cursor = _Cursor(data)
    if bytes(cursor.take(min(4, len(data)))) != _MAGIC:
        raise _MalformedError("is no GGUF file: it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        big = " (or it is big-endian)" if version >= 1 << 16 else ""
        raise _MalformedError(f"is GGUF version {version}{big}, this program reads 2 and 3")
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.text()
        if key in metadata:
            raise _MalformedError(f"is damaged: it has {key} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    found = [_tensor(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise _MalformedError(f"is damaged: its alignment is {alignment}")
    start = -(-cursor.place // alignment) * alignment
    tensors = {
        name: TensorInfo(name=name, shape=shape, kind=kind, offset=start + offset)
        for name, shape, kind, offset in found
    }
    if len(tensors) != len(found):
        raise _MalformedError("is damaged: it has two tensors of one name")
    return metadata, tensors


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape with the outermost dim first, type, and offset in the data."""
    name = cursor.text()
    dims = cursor.number("I")
    if not 1 <= dims <= _MAX_DIMS:
        raise _MalformedError(f"is damaged: {name} has {dims} dims")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    if 0 in shape:
        raise _MalformedError(f"is damaged: {name} is empty")
    return name, shape, cursor.number("I"), cursor.number("Q")
