"""Finds the tensors in a file of ``torch.save``, both formats. This module does not import torch.

The present format is a zip archive; the one before torch 1.6 is a sequence of pickles::

    archive/data.pkl   the object; tensors refer to storages by key
    archive/data/KEY   the bytes of a storage, never compressed

    magic | protocol | system | object | keys | (number of elements, bytes) of each storage
"""

from __future__ import annotations

import struct
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from cp_megatron.checkpoint.inert_pickle import TORCH_BYTES, MalformedError, Record, read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DIMS = 16
_MAX_DEPTH, _MAX_CONTAINERS = 100, 1_000_000
"""Lists may contain each other, so a walk through them might never end."""


@dataclass(frozen=True, kw_only=True)
class TorchTensor:
    """A tensor's dtype (``float32``), shape, strides in elements, and first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @property
    def extent(self) -> int:
        """The number of elements from its first to its last one."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides))


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


def read_torch_file(stream: IO[bytes]) -> dict[str, TorchTensor]:
    """Returns the tensors by name; the names of nested dicts are joined by dots.

    A tensor that was saved by itself has the name ``""``.

    Args:
        stream: the whole file, which can be rewound.

    Raises:
        MalformedError: the file is damaged, or holds anything but tensors and plain values.
        OSError: the file cannot be read.
    """
    try:
        content, places = (_read_zip if zipfile.is_zipfile(stream) else _read_old)(stream)
    except (MalformedError, OSError, MemoryError):
        raise
    except Exception as error:  # the bytes may be anything, and so may the errors
        raise MalformedError(f"is truncated or damaged ({error})") from None
    tensors: dict[str, TorchTensor] = {}
    for name, record in _named(content):
        if name in tensors:
            raise MalformedError(f"holds {name} twice")
        tensors[name] = _located(name, record, places)
    return tensors


def _named(content: Any) -> Iterator[tuple[str, Record]]:
    """Yields the tensors in nested dicts and lists, with their names, level by level."""
    left = deque([("", content, 0)])
    for _ in range(_MAX_CONTAINERS):
        if not left:
            return
        name, value, depth = left.popleft()
        if depth > _MAX_DEPTH:
            break
        if isinstance(value, Record) and value.name == "_rebuild_parameter" and value.args:
            value = value.args[0]
        if isinstance(value, Record) and value.name == "_rebuild_tensor_v2":
            yield name, value
        items: Iterable[tuple[object, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        left += [
            (f"{name}.{key}" if depth else str(key), item, depth + 1)
            for key, item in items
            if isinstance(item, Mapping | list | tuple | Record)
        ]
    raise MalformedError(
        f"holds lists or dicts that are nested more than {_MAX_DEPTH} deep, or more than "
        f"{_MAX_CONTAINERS:,} of them"
    )


def _located(name: str, record: Record, places: Mapping[str, tuple[int, int]]) -> TorchTensor:
    """The tensor that a record describes, if it lies inside its storage."""
    match record.args:
        case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            numbers = (offset, *shape, *strides)
            sound = len(shape) == len(strides) <= _MAX_DIMS and storage.key in places
            if sound and all(type(x) is int and 0 <= x < 1 << 48 for x in numbers):
                (begin, end), size = places[storage.key], TORCH_BYTES[storage.dtype]
                start = begin + offset * size
                found = TorchTensor(dtype=storage.dtype, shape=shape, strides=strides, start=start)
                if start + found.extent * size <= end:
                    return found
    raise MalformedError(f"is damaged: {name} does not lie inside its storage")


def _storage(pid: Any) -> _Storage:
    match pid:
        case ("storage", str(dtype), str(key), *rest) if dtype in TORCH_BYTES:
            if len(rest) < 3 or rest[2] is None:
                return _Storage(key, dtype)
    raise MalformedError("refers to a storage of another kind than torch writes for a tensor")


def _read_zip(stream: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The object, and the bytes of each storage by key, as (start, end) in the file."""
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise MalformedError("is a zip archive, but not one of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise MalformedError("is compressed, which torch.save does not do")
        order = entries.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise MalformedError("was written on a big-endian machine")
        with archive.open(pickles[0]) as data:
            content = read_pickle(data, _storage)
    places: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        if name.startswith(f"{root}data/"):
            stream.seek(entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
            places[name.removeprefix(f"{root}data/")] = (start, start + entry.file_size)
    return content, places


def _read_old(stream: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Reads a file in the format that torch wrote before 1.6."""
    dtypes: dict[str, str] = {}

    def storage(pid: Any) -> _Storage:
        found = _storage(pid)
        dtypes[found.key] = found.dtype
        return found

    stream.seek(0)
    try:
        magic = read_pickle(stream)
    except MalformedError:
        magic = None
    if magic != _MAGIC:
        raise MalformedError("is truncated, or not a file of torch.save")
    _, system = read_pickle(stream), read_pickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise MalformedError("was written on a big-endian machine")
    content, keys = read_pickle(stream, storage), read_pickle(stream)
    places, place = {}, stream.tell()
    size = stream.seek(0, 2)
    for key in keys if isinstance(keys, list) else ():
        stream.seek(place)
        head = stream.read(8)
        if not isinstance(key, str) or key not in dtypes or len(head) < 8:
            raise MalformedError("is truncated or damaged: a storage is missing")
        start, num_bytes = place + 8, struct.unpack("<Q", head)[0] * TORCH_BYTES[dtypes[key]]
        place = start + num_bytes
        if place > size:
            raise MalformedError(f"is truncated: it needs {place} bytes and has {size}")
        places[key] = (start, place)
    return content, places
