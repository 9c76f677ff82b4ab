"""Copies one rank's part of a checkpoint while training waits, and writes it while training runs.

The copy already has the layout of the file (huggingface/safetensors, "Format"), so that it can be
written without another copy:

    8 bytes   length of the header
    header    JSON: name -> dtype, shape, begin and end of its bytes; padded to 64 bytes
    bytes     the tensors one after the other, those with the widest elements first

The writer of the safetensors library would copy every tensor again while it holds Python's global
lock, and it computes no hash.

A large file is written with O_DIRECT where the file system supports it. Copying the file into the
page cache would take more processor time than hashing it, which slows the training that runs at the
same time, and would evict what other programs read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from cp_megatron.checkpoint.manifest import DTYPE_CODES, ELEMENT_BYTES, FileEntry
from cp_megatron.model.offload import PinnedBuffer

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: getattr(torch, name) for name in ELEMENT_BYTES}
)
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {dtype: name for name, dtype in DTYPES.items()}
)
PIECE_BYTES = 1 << 20
"""Bytes hashed and written at once. With 16 MiB, a step during a save is 1-2% slower."""
DIRECT_BYTES = 1 << 20
"""The size from which a file is written with O_DIRECT."""
_BLOCK = 4096
"""O_DIRECT needs memory and file offsets that are multiples of this."""


class HostMemory:
    """Host memory for one image at a time, reused by the next one.

    Training waits for the copy, and filling new memory takes four times as long. From a GPU, images
    are copied into page-locked memory, which is ten times as fast but slow to allocate.
    """

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)
        self._pinned: PinnedBuffer | None = None

    def take(self, num_bytes: int, *, pinned: bool) -> Tensor:
        """Returns uint8 [num_bytes], aligned to a block. It overwrites what was taken before.

        ``pinned``, whether the memory is page-locked, must be the same in every call.
        """
        if self._held.numel() < num_bytes:
            self._held = torch.empty(0, dtype=torch.uint8)  # free the old memory first
            if pinned:
                self._pinned = None
                self._pinned = PinnedBuffer(num_bytes)
                self._held = self._pinned.memory
            else:
                memory = torch.empty(num_bytes + _BLOCK, dtype=torch.uint8)
                self._held = memory[-memory.data_ptr() % _BLOCK :]
        return self._held[:num_bytes]


def take_image(tensors: Mapping[str, Tensor], memory: HostMemory) -> Tensor:
    """Copies tensors into the contents of a shard file, uint8. They may change when this returns.

    Args:
        tensors: tensors by name, on one device, with dtypes of ``DTYPES``.
        memory: holds the copy.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    shapes = {name: (DTYPE_NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    header = file_header(shapes, alignment=64)
    on_device = [tensor for tensor in tensors.values() if tensor.is_cuda]
    num_bytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    image = memory.take(num_bytes, pinned=bool(on_device))
    image[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    begin = len(header)
    for tensor in tensors.values():
        place = image[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor, non_blocking=True)
        begin += tensor.nbytes
    if on_device:
        torch.cuda.current_stream(on_device[0].device).synchronize()
    return image


def file_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], *, alignment: int, **entries: object
) -> bytes:
    """Returns the header of a safetensors file, with its length.

    Args:
        tensors: the dtype and shape of each tensor by its name, in the order of their bytes.
        alignment: the header is padded to a multiple of this.
        entries: what the header begins with.
    """
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * ELEMENT_BYTES[dtype]
        place = {"shape": list(shape), "data_offsets": [begin, end]}
        entries[name] = {"dtype": DTYPE_CODES[dtype], **place}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def write_image(path: Path, image: Tensor) -> FileEntry:
    """Writes the result of ``take_image`` to a new file, and returns when it is on the disk.

    Raises:
        OSError: the file exists or cannot be written.
    """
    digest = hashlib.sha256()
    data = memoryview(image.numpy().data)
    with _new_file(path) as descriptor:
        if len(data) >= DIRECT_BYTES:
            _set_direct(descriptor, True)
        for at in range(0, len(data), PIECE_BYTES):
            piece = data[at : at + PIECE_BYTES]
            digest.update(piece)
            write_all(descriptor, piece)
    return FileEntry(size=len(data), sha256=digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Writes a new UTF-8 file, and returns when it is on the disk."""
    with _new_file(path) as descriptor:
        write_all(descriptor, memoryview(text.encode()))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """Writes all data. A file system may accept less at once, or no partial block with O_DIRECT."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Turns O_DIRECT on or off if the file system can; returns whether this changed anything."""
    direct = getattr(os, "O_DIRECT", 0)
    with contextlib.suppress(OSError):
        before = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        after = before | direct if wanted else before & ~direct
        if after != before:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, after)
            return True
    return False


def discard(folder: Path) -> None:
    """Removes a folder or a file. A link is removed and not followed."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Returns when the file's contents or the folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
