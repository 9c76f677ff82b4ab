"""Reads the header of a GGUF file: its metadata and the shapes of its tensors.

The reader never trusts a length in the header beyond the end of the file, so it refuses a damaged
file within milliseconds. The readers of the packages ``gguf`` and ``transformers`` take a damaged
count at its word, and may never return.

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
from typing import Any, cast

import numpy as np

from cp_megatron.config.files.foreign_folders import FROM_GGUF, recognize
from cp_megatron.errors import ConfigError

FLAG = FROM_GGUF
_WORKS = "a complete GGUF file, version 2 or 3"
_STRING, _ARRAY = 8, 9
# uint8 int8 uint16 int16 uint32 int32 float32 bool, uint64 int64 float64; 8 and 9 are above.
_SCALARS: Mapping[int, str] = {**dict(enumerate("BbHhIif?")), **dict(enumerate("Qqd", start=10))}


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A file whose header is sound and whose tensors lie inside it.

    Arrays in ``metadata`` are lists. Shapes have the outermost dim first; a matrix is [out, in].
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
        if (foreign := recognize(FLAG, path)) is not None:
            raise foreign
        try:
            import gguf
        except ImportError:
            rule = "reading GGUF needs the package gguf"
            raise ConfigError(FLAG, "", rule, "pip install 'cp_megatron[hf]'") from None
        try:
            # Opening a named pipe would wait for a writer, and an empty file cannot be mapped.
            if not stat.S_ISREG(path.stat().st_mode) or not path.stat().st_size:
                raise ConfigError(FLAG, path, "is empty or not a regular file", _WORKS)
            reader = _HeaderReader(memoryview(cast(Any, np.memmap(path, dtype="u1", mode="r"))))
            metadata, shapes = reader.read(gguf)
            return cls(path=path, metadata=metadata, shapes=shapes)
        except OSError as error:
            raise ConfigError(FLAG, path, f"cannot be read: {error.strerror}", _WORKS) from None
        except _MalformedError as error:
            raise ConfigError(FLAG, path, str(error), _WORKS) from None


def shortest_float(value: float) -> float:
    """Returns the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06.

    Raises:
        ValueError: it is not above 0 and below 1e30.
    """
    if not 0 < value < 1e30:
        raise ValueError(f"{value} must lie in 0 to 1e30")
    return float(str(np.float32(value)))


class _MalformedError(Exception):
    """Says what is wrong with the file, as a clause."""


class _HeaderReader:
    """Reads from front to back, and refuses to read past the end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 4

    def read(self, gguf: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        if bytes(self.data[:4]) != b"GGUF":
            raise _MalformedError("is not a GGUF file: it does not begin with GGUF")
        version, num_tensors, num_pairs = self.take("IQQ")
        if version not in (2, 3):
            raise _MalformedError(f"is GGUF version {version} or big-endian")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.text()
            metadata[key] = self.value(*self.take("I"))
        tensors = dict(self.tensor(gguf) for _ in range(num_tensors))
        if (len(metadata), len(tensors)) != (num_pairs, num_tensors):
            raise _MalformedError("is damaged: a name is there twice")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8:
            raise _MalformedError(f"is damaged: its alignment is {alignment}")
        start = -(-self.place // alignment) * alignment
        for name, (_, end) in tensors.items():
            if start + end > len(self.data):
                place = f"ends at byte {start + end} of {len(self.data)}"
                raise _MalformedError(f"is truncated: {name} {place}")
        return metadata, {name: shape for name, (shape, _) in tensors.items()}

    def raw(self, size: int) -> memoryview:
        if size > len(self.data) - self.place:
            place = f"asks for {size} bytes at {self.place}, the file has {len(self.data)}"
            raise _MalformedError(f"is truncated or damaged: its header {place}")
        self.place += size
        return self.data[self.place - size : self.place]

    def take(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.raw(struct.calcsize("<" + form)))

    def text(self) -> str:
        try:
            return bytes(self.raw(*self.take("Q"))).decode("utf-8")
        except UnicodeDecodeError:
            raise _MalformedError(f"is damaged: the text at {self.place} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        item, count = self.take("IQ") if kind == _ARRAY else (kind, 0)
        if item in _SCALARS:
            data = self.raw(count * struct.calcsize("<" + _SCALARS[item]))
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", data))
        # A text takes at least the 8 bytes of its length.
        if item != _STRING or count * 8 > len(self.data) - self.place:
            raise _MalformedError(f"is truncated or damaged: {count} x type {item} at {self.place}")
        return [self.text() for _ in range(count)]

    def tensor(self, gguf: Any) -> tuple[str, tuple[tuple[int, ...], int]]:
        """Name, and (shape, end in the data section in bytes)."""
        name, (num_dims,) = self.text(), self.take("I")
        if not 1 <= num_dims <= 4:
            raise _MalformedError(f"is damaged: {name} has {num_dims} dims")
        shape = self.take(f"{num_dims}Q")[::-1]
        kind, offset = self.take("IQ")
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _MalformedError(f"{name} has the type {kind}, which gguf does not know") from None
        if 0 in shape or shape[-1] % block:
            raise _MalformedError(f"{name} has the shape {list(shape)}, in blocks of {block}")
        return name, (shape, offset + math.prod(shape) // block * size)
