"""Reads what a folder of torch.distributed.checkpoint (DCP) holds. Does not import torch.

A folder has ``.metadata``, a pickle that says which box of which tensor is where, and files
``__0_0.distcp`` of what ``torch.save`` wrote, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cp_megatron.checkpoint.inert_pickle import TORCH_BYTES, MalformedError, Record, read_pickle
from cp_megatron.config.files.foreign_folders import DCP_METADATA


@dataclass(frozen=True, kw_only=True)
class DCPChunk:
    """A box of a tensor, and the ``length`` bytes from ``start`` on of the file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class DCPTensor:
    """A tensor's dtype (``float32``), its global shape and the chunks that fill it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[DCPChunk, ...]


@dataclass(frozen=True, kw_only=True)
class DCPFolder:
    """The tensors of a folder by name, and the names of what is not a tensor."""

    tensors: Mapping[str, DCPTensor]
    others: frozenset[str]


def read_dcp_metadata(folder: Path) -> DCPFolder:
    """Reads and checks the metadata of a folder; files with values are not opened.

    Raises:
        MalformedError: the metadata is damaged, or holds what torch does not write there.
        OSError: it cannot be read.
    """
    with (folder / DCP_METADATA).open("rb") as stream:
        content = read_pickle(stream)
    try:
        fields = _fields(content, "Metadata")
        stored = _stored(fields["storage_data"])
        tensors, others = {}, set()
        for name, record in fields["state_dict_metadata"].items():
            if isinstance(record, Record) and record.name == "BytesStorageMetadata":
                others.add(str(name))
            else:
                tensors[str(name)] = _tensor(str(name), record, stored)
    except (KeyError, TypeError, ValueError, AttributeError):
        rule = f"{DCP_METADATA} is damaged: it does not describe a checkpoint"
        raise MalformedError(rule) from None
    return DCPFolder(tensors=tensors, others=frozenset(others))


def _fields(record: Any, name: str) -> dict[str, Any]:
    """The attributes of an object of the class ``name``."""
    if not isinstance(record, Record) or record.name != name or not isinstance(record.state, dict):
        raise TypeError
    return record.state


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(x) is int and 0 <= x < 1 << 48 for x in value):
        raise TypeError
    return value


_Places = Mapping[tuple[str, tuple[int, ...]], dict[str, Any]]


def _stored(data: Any) -> _Places:
    """Where each box lies, by the name of its tensor and its offsets."""
    places = {}
    for index, info in data.items():
        key = _fields(index, "MetadataIndex")
        if key.get("offset") is not None:
            places[str(key["fqn"]), _sizes(key["offset"])] = _fields(info, "_StorageInfo")
    return places


def _tensor(name: str, record: Any, places: _Places) -> DCPTensor:
    fields = _fields(record, "TensorStorageMetadata")
    properties, shape = fields["properties"], _sizes(fields["size"])
    # Present versions write a tuple, the first ones a dict.
    state = properties.state
    dtype = state["dtype"] if isinstance(state, dict) else state[0]
    if dtype not in TORCH_BYTES:
        raise TypeError
    chunks = [_chunk(name, _fields(x, "ChunkStorageMetadata"), places) for x in fields["chunks"]]
    filled = [chunk for chunk in chunks if chunk is not None]
    inside = all(
        len(chunk.sizes) == len(chunk.offsets) == len(shape)
        and all(x + n <= most for x, n, most in zip(chunk.offsets, chunk.sizes, shape))
        for chunk in filled
    )
    if not inside or sum(math.prod(chunk.sizes) for chunk in filled) != math.prod(shape):
        raise MalformedError(f"{DCP_METADATA} is damaged: the chunks of {name} do not fill it")
    return DCPTensor(dtype=dtype, shape=shape, chunks=tuple(filled))


def _chunk(name: str, fields: dict[str, Any], places: _Places) -> DCPChunk | None:
    """A chunk; None if it is empty, which happens where ranks outnumber rows."""
    offsets, sizes = _sizes(fields["offsets"]), _sizes(fields["sizes"])
    if 0 in sizes:
        return None
    info = places[name, offsets]
    file, start, length = (info[key] for key in ("relative_path", "offset", "length"))
    # A name without a separator cannot lead out of the folder.
    if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
        raise MalformedError(f"{DCP_METADATA} names {str(file)[:80]!r}, which is no file beside it")
    if info.get("transform_descriptors"):
        raise MalformedError("is compressed by an extension of torch.distributed.checkpoint")
    start, length = _sizes((start, length))
    return DCPChunk(offsets=offsets, sizes=sizes, file=file, start=start, length=length)
