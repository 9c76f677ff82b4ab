"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

The reader is bounded: it compares every length in the header with what is left of the file before
it uses the length, so it refuses a damaged file within milliseconds. The readers of the packages
``gguf`` and ``transformers`` do not: a damaged count keeps them busy for ever.

    "GGUF" version  tensors  pairs | key type value ... | name dims type offset ... | pad | data
     4 B    u32      u64      u64

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from cp_megatron.errors import ConfigError

FLAG = "--from-gguf"
_WORKS = "a complete GGUF file, version 2 or 3"
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
class GGUFFile:
    """A file whose header is sound and whose tensors lie inside it.

    Attributes:
        metadata: the key-value pairs; arrays are lists.
        shapes: name of a tensor -> its shape, outermost dim first; a matrix is [out, in].
    """

    path: Path
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path | str) -> GGUFFile:
        """Reads the header and compares the place of every tensor with the size of the file.

        Raises:
            ConfigError: the package gguf is missing, or the file is not a complete GGUF file.
        """
        path = Path(path)
        library = gguf_package()
        try:
            # Opening a named pipe would wait for a writer.
            if not stat.S_ISREG(path.stat().st_mode):
                raise ConfigError(FLAG, path, "is not a file", _WORKS)
            if path.stat().st_size == 0:
                raise ConfigError(FLAG, path, "is empty", _WORKS)
            data = np.memmap(path, dtype=np.uint8, mode="r")
            return cls(path=path, **_read_header(_Cursor(memoryview(cast(Any, data))), library))
        except OSError as error:
            raise ConfigError(FLAG, path, f"cannot be read: {error.strerror}", _WORKS) from None
        except _MalformedError as error:
            raise ConfigError(FLAG, path, str(error), _WORKS) from None


def gguf_package() -> ModuleType:
    """Imports the package gguf, which knows the size of each quantised block.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        rule = "reading GGUF needs the package gguf"
        raise ConfigError(FLAG, "", rule, "pip install 'cp_megatron[hf]'") from None
    return gguf


class _MalformedError(Exception):
    """Says what is wrong with the file, as a clause."""


class _Cursor:
    """Reads a file from front to back, and refuses to read past its end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.place = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.place:
            raise _MalformedError(
                f"is truncated or damaged: its header asks for {size} bytes at {self.place}, "
                f"the file has {len(self.data)}"
            )
        self.place += size
        return self.data[self.place - size : self.place]

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def text(self) -> str:
        try:
            return bytes(self.take(self.number("Q"))).decode("utf-8")
        except UnicodeDecodeError:
            raise _MalformedError(f"is damaged: the text at {self.place} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _MalformedError(f"is damaged: the value at {self.place} has the type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            data = self.take(count * struct.calcsize("<" + _SCALARS[kind]))
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", data))
        if kind != _STRING:
            raise _MalformedError(f"has an array of type {kind}, which no converter writes")
        # Each text takes at least the 8 bytes of its length.
        if count * 8 > len(self.data) - self.place:
            raise _MalformedError(f"is truncated or damaged: {count} texts at {self.place}")
        return [self.text() for _ in range(count)]


def _read_header(cursor: _Cursor, library: ModuleType) -> dict[str, Any]:
    if bytes(cursor.data[:4]) != b"GGUF":
        raise _MalformedError("is not a GGUF file: it does not begin with GGUF")
    cursor.take(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        big = " (or it is big-endian)" if version >= 1 << 16 else ""
        raise _MalformedError(f"is GGUF version {version}{big}, this program reads 2 and 3")
    num_tensors, num_pairs = cursor.numbers("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.text()
        if key in metadata:
            raise _MalformedError(f"is damaged: it has the key {key} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    shapes: dict[str, tuple[int, ...]] = {}
    ends: dict[str, int] = {}
    for _ in range(num_tensors):
        name, shape, end = _read_tensor(cursor, library)
        if name in shapes:
            raise _MalformedError(f"is damaged: it has the tensor {name} twice")
        shapes[name], ends[name] = shape, end
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise _MalformedError(f"is damaged: its alignment is {alignment}")
    start = -(-cursor.place // alignment) * alignment
    for name, end in ends.items():
        if start + end > len(cursor.data):
            raise _MalformedError(
                f"is truncated: {name} ends at byte {start + end} of {len(cursor.data)}"
            )
    return {"metadata": metadata, "shapes": shapes}


def _read_tensor(cursor: _Cursor, library: ModuleType) -> tuple[str, tuple[int, ...], int]:
    """Name, shape with the outermost dim first, and the end in the data section, in bytes."""
    name = cursor.text()
    num_dims = cursor.number("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise _MalformedError(f"is damaged: {name} has {num_dims} dims")
    shape = cursor.numbers(f"{num_dims}Q")[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    try:
        block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _MalformedError(f"{name} has the type {kind}, which gguf does not know") from None
    if 0 in shape or shape[-1] % block:
        raise _MalformedError(f"{name} has the shape {list(shape)} in blocks of {block} elements")
    return name, shape, offset + math.prod(shape) // block * size
