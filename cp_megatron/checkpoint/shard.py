"""One rank's part of a checkpoint: copied in a moment, then written without holding anybody up.

The copy is the file's contents, so that writing it needs no second copy and no tensor:

    8 bytes   length of the header
    header    JSON: name -> dtype, shape, where its bytes begin and end; blanks up to 8 bytes
    bytes     of all tensors, one after the other, those with wide elements first

which is the format of safetensors (huggingface/safetensors, "Format"); its own writer would copy
every tensor once more while it holds Python's lock, and hash nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from cp_megatron.checkpoint.manifest import ELEMENT_BYTES, FileEntry
from cp_megatron.model.offload import PinnedPiece

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: getattr(torch, name) for name in ELEMENT_BYTES}
)
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {dtype: name for name, dtype in DTYPES.items()}
)
_CODES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)
PIECE_BYTES = 16 << 20
"""Bytes hashed and written at once."""


@dataclass(frozen=True)
class ShardImage:
    """A shard file in memory.

    Attributes:
        header: its length and its JSON.
        data: uint8 [bytes of all tensors], on the host.
    """

    header: bytes
    data: Tensor


class HostMemory:
    """Where images are copied to, one at a time.

    From a GPU they are copied into page-locked memory, ten times as fast; locking takes longer than
    a copy, so it is kept for the next image. On the CPU it is let go with the image.
    """

    def __init__(self) -> None:
        self._pinned: PinnedPiece | None = None

    def take(self, num_bytes: int, *, pinned: bool) -> Tensor:
        """uint8 [num_bytes]; what was taken before must not be used any more where pinned."""
        if not pinned or not num_bytes:
            return torch.empty(num_bytes, dtype=torch.uint8)
        if self._pinned is None or self._pinned.num_bytes < num_bytes:
            self._pinned = None
            self._pinned = PinnedPiece(num_bytes)
        return self._pinned.memory[:num_bytes]


def take_image(tensors: Mapping[str, Tensor], memory: HostMemory) -> ShardImage:
    """Copies tensors; they may change as soon as this returns.

    Args:
        tensors: by name, of dtypes in ``DTYPES``, on one device.
        memory: where to.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    on_device = [tensor for tensor in tensors.values() if tensor.is_cuda]
    data = memory.take(end, pinned=bool(on_device))
    begin = 0
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        place = data[begin : begin + size].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor, non_blocking=True)
        begin += size
    if on_device:
        torch.cuda.current_stream(on_device[0].device).synchronize()
    return ShardImage(len(text).to_bytes(8, "little") + text, data)


def write_image(path: Path, image: ShardImage) -> FileEntry:
    """Writes a new file and returns when it is on the disk: its size and SHA-256.

    Raises:
        OSError: as the file system does.
    """
    digest = hashlib.sha256()
    data = memoryview(image.data.numpy().data)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        pieces = range(0, len(data), PIECE_BYTES)
        for piece in (memoryview(image.header), *(data[at : at + PIECE_BYTES] for at in pieces)):
            digest.update(piece)
            write_all(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(size=len(image.header) + len(data), sha256=digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """The same for a text, in UTF-8."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, memoryview(text.encode()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """All of it: a file system may take less at once."""
    while data:
        data = data[os.write(descriptor, data) :]


def discard(folder: Path) -> None:
    """Removes what a save that did not finish left behind; a link is removed, not followed."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Returns when the file's contents, or the folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
