"""One rank's part of a checkpoint: copied in a moment, then written without holding anybody up.

The copy is the file's contents, so that writing it needs no second copy and no tensor:

    8 bytes   length of the header
    header    JSON: name -> dtype, shape, where its bytes begin and end; blanks up to 64 bytes
    bytes     of all tensors, one after the other, those with wide elements first

which is the format of safetensors (huggingface/safetensors, "Format"); its own writer would copy
every tensor once more while it holds Python's lock, and hash nothing.

A large file goes past the system's cache where the file system allows: copying it there takes more
of the processor than hashing it, from a training that goes on, and pushes out what others read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
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
PIECE_BYTES = 1 << 20
"""Bytes hashed and written at once: with 16 times as many a step beside a save is 1-2% slower."""
DIRECT_BYTES = 1 << 20
"""Of a file that is worth going past the cache for."""
_BLOCK = 4096
"""What then must begin and end at a multiple of it, in memory and in the file."""
_HEADER_BLANKS = 64


class HostMemory:
    """Where images are copied to, one at a time; kept for the next one.

    Fresh memory takes four times as long to fill, page by page, and the training waits. From a GPU
    images are copied into page-locked memory, ten times as fast, and locking takes longer still.
    """

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)
        self._pinned: PinnedPiece | None = None

    def take(self, num_bytes: int, *, pinned: bool) -> Tensor:
        """uint8 [num_bytes], from a block's begin on, where what was taken before may have lain.

        Args:
            num_bytes: wanted.
            pinned: page-locked; always or never.
        """
        if self._held.numel() < num_bytes:
            self._held = torch.empty(0, dtype=torch.uint8)  # never both
            if pinned:
                self._pinned = None
                self._pinned = PinnedPiece(num_bytes)
                self._held = self._pinned.memory
            else:
                memory = torch.empty(num_bytes + _BLOCK, dtype=torch.uint8)
                self._held = memory[-memory.data_ptr() % _BLOCK :]
        return self._held[:num_bytes]


def take_image(tensors: Mapping[str, Tensor], memory: HostMemory) -> Tensor:
    """Copies tensors; they may change as soon as this returns.

    Args:
        tensors: by name, of dtypes in ``DTYPES``, on one device.
        memory: where to.

    Returns:
        uint8, the contents of a shard's file.
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
    text += b" " * (-(8 + len(text)) % _HEADER_BLANKS)
    header = len(text).to_bytes(8, "little") + text
    on_device = [tensor for tensor in tensors.values() if tensor.is_cuda]
    image = memory.take(len(header) + end, pinned=bool(on_device))
    image[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    begin = len(header)
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        place = image[begin : begin + size].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor, non_blocking=True)
        begin += size
    if on_device:
        torch.cuda.current_stream(on_device[0].device).synchronize()
    return image


def write_image(path: Path, image: Tensor) -> FileEntry:
    """Writes a new file and returns when it is on the disk: its size and SHA-256.

    Args:
        path: of the file.
        image: what ``take_image`` returned.

    Raises:
        OSError: as the file system does.
    """
    digest = hashlib.sha256()
    data = memoryview(image.numpy().data)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if len(data) >= DIRECT_BYTES:
            _pass_cache(descriptor, True)
        for at in range(0, len(data), PIECE_BYTES):
            piece = data[at : at + PIECE_BYTES]
            digest.update(piece)
            write_all(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(size=len(data), sha256=digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """The same for a text, in UTF-8."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, memoryview(text.encode()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """All of it: a file system may take less at once, or no part of a block past its cache."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _pass_cache(descriptor, False):
                raise


def _pass_cache(descriptor: int, wanted: bool) -> bool:
    """Whether this changed where the file's writes go; not every system and file system can."""
    direct = getattr(os, "O_DIRECT", 0)
    with contextlib.suppress(OSError):
        before = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        after = before | direct if wanted else before & ~direct
        if after != before:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, after)
            return True
    return False


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
