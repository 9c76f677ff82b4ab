"""Megatron-LM's tokenised data: ``PREFIX.bin`` holds the ids, ``PREFIX.idx`` where they begin.

The layout is that of ``megatron/core/datasets/indexed_dataset.py``, little-endian:

    PREFIX.idx   "MMIDIDX\\0\\0"   9 bytes
                 version          u64 = 1
                 code of a type   u8: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
                 sequences        u64
                 documents + 1    u64
                 lengths          i32 [sequences], in ids
                 pointers         i64 [sequences], in bytes of PREFIX.bin
                 document index   i64 [documents + 1], in sequences: 0 .. sequences
                 (modes           i8  [sequences], multimodal data only)
    PREFIX.bin   the ids of all sequences, one after the other

``open`` finds everything that can be wrong with a pair, except ids outside the vocabulary:
``check_vocabulary`` reads all ids.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES: Mapping[int, str] = MappingProxyType(
    {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
)
"""Code of a type in the header -> numpy's name of the type."""
_WORKS = "a pair PREFIX.bin and PREFIX.idx, made by launch/prepare_data.py or by Megatron-LM"
_CHUNK = 1 << 24
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, kw_only=True)
class IndexedDataset:
    """A pair that was checked; ``open`` makes one.

    Attributes:
        prefix: the path of the two files without ``.bin`` and ``.idx``.
        lengths: int32 [sequences], the number of ids in each.
        starts: int64 [sequences], where each begins in ``tokens``.
        document_index: int64 [documents + 1], the first sequence of each document, then the number
            of sequences. Sequence i belongs to the last document whose entry is at most i.
        tokens: integers [n], all ids, mapped from the file and read-only.
        fingerprint: SHA-256 (hex) of the .idx, of the .bin's size and of samples of the .bin.
    """

    prefix: str
    lengths: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    document_index: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any]
    fingerprint: str

    @classmethod
    def open(cls, prefix: str, *, flag: str = "--data-path") -> IndexedDataset:
        """Opens and checks a pair. Of the ids it reads only a few samples.

        Args:
            prefix: the path of the files without ``.bin`` and ``.idx``.
            flag: the flag that named the pair.

        Raises:
            ConfigError: names the file and what is wrong with it.
        """
        index, binary = prefix + ".idx", prefix + ".bin"
        for path in (index, binary):
            if not os.path.isfile(path):
                rule = "must be a regular file" if os.path.exists(path) else "there is no such file"
                raise ConfigError(flag, path, rule, _WORKS)
        try:
            size = os.path.getsize(binary)
            mapped: Any = np.memmap(index, np.uint8, "r") if os.path.getsize(index) else b""
            data = memoryview(mapped)
            dtype, lengths, document_index = _parse(data)
            total = int(lengths.sum(dtype=np.int64))
            if size != total * dtype.itemsize:
                rule = f"has {size} bytes, but its .idx says {total} ids of {dtype.itemsize} bytes"
                raise ConfigError(flag, binary, rule, _WORKS)
            return cls(
                prefix=prefix,
                lengths=lengths,
                starts=np.cumsum(lengths, dtype=np.int64) - lengths,
                document_index=document_index,
                tokens=np.memmap(binary, dtype=dtype, mode="r"),
                fingerprint=_fingerprint(data, binary, size),
            )
        except _MalformedError as error:
            raise ConfigError(flag, index, str(error), _WORKS) from None
        except OSError as error:
            raise ConfigError(flag, prefix, f"cannot be read: {error.strerror}", _WORKS) from None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Reads all ids, a chunk at a time.

        Raises:
            ConfigError: names the first id outside [0, vocab_size), and its place.
        """
        kind = np.iinfo(self.tokens.dtype)
        if kind.min >= 0 and kind.max < vocab_size:
            return
        for start in range(0, len(self.tokens), _CHUNK):
            chunk = self.tokens[start : start + _CHUNK]
            if int(chunk.min()) >= 0 and int(chunk.max()) < vocab_size:
                continue
            place = int(np.flatnonzero((chunk < 0) | (chunk >= vocab_size))[0])
            where = start + place
            sequence = int(np.searchsorted(self.starts, where, side="right")) - 1
            rule = f"id {chunk[place]} at position {where} (sequence {sequence}) lies outside "
            rule += f"the vocabulary of {vocab_size}"
            works = "the tokenizer that the data was made with"
            raise ConfigError("--data-path", f"{self.prefix}.bin", rule, works)


class _MalformedError(Exception):
    """Says what is wrong with an .idx."""


def _parse(data: memoryview) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The type of the ids, the lengths and the document index of an .idx, checked."""
    if len(data) < HEADER.size:
        rule = f"is truncated: {len(data)} bytes, the header alone has {HEADER.size}"
        raise _MalformedError(rule)
    magic, version, code, sequences, entries = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise _MalformedError("does not begin like an index of Megatron (MMIDIDX)")
    if version != VERSION:
        raise _MalformedError(f"has version {version}, only {VERSION} is known")
    if code not in CODES:
        raise _MalformedError(f"has code {code} for the type of its ids, known are 1 to 8")
    dtype = np.dtype(CODES[code])
    if dtype.kind not in "iu":
        raise _MalformedError(f"says that its ids are {dtype.name}, but ids are integers")
    size = HEADER.size + 12 * sequences + 8 * entries
    if len(data) not in (size, size + sequences):
        rule = f"is {'truncated' if len(data) < size else 'too long'}: {len(data)} bytes, but "
        rule += f"{sequences} sequences and {entries} entries of the document index need {size}"
        raise _MalformedError(rule)
    # Copies, because the tables lie at odd addresses of the file.
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size).copy()
    pointers = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences).copy()
    documents = np.frombuffer(data, "<i8", entries, HEADER.size + 12 * sequences).copy()
    _check_tables(lengths, pointers, documents, dtype.itemsize)
    return dtype, lengths, documents


def _check_tables(
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    itemsize: int,
) -> None:
    if (bad := np.flatnonzero(lengths < 0)).size:
        raise _MalformedError(f"gives sequence {bad[0]} the length {lengths[bad[0]]}")
    expected = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    if (bad := np.flatnonzero(expected != pointers)).size:
        rule = f"says that sequence {bad[0]} begins at byte {pointers[bad[0]]}, but the lengths "
        raise _MalformedError(f"{rule}before it add up to {expected[bad[0]]}")
    if documents.size == 0 or documents[0] != 0:
        raise _MalformedError("has a document index that does not begin with 0")
    if (bad := np.flatnonzero(documents[1:] < documents[:-1])).size:
        raise _MalformedError(f"has a document index that decreases at entry {bad[0] + 1}")
    if documents[-1] != len(lengths):
        rule = f"has a document index that ends with {documents[-1]}, but there are "
        raise _MalformedError(f"{rule}{len(lengths)} sequences")
    if not lengths.any():
        raise _MalformedError("holds no ids")


def _fingerprint(index: memoryview, binary: str, size: int) -> str:
    digest = hashlib.sha256(index)
    digest.update(f" {size} ".encode())
    with open(binary, "rb") as stream:
        for sample in range(_SAMPLES):
            stream.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def optimal_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of Megatron's writer: uint16 for a vocabulary below 65,500, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def write_indexed(
    prefix: str, parts: Iterable[tuple[Path, npt.NDArray[np.int32]]], *, vocab_size: int
) -> None:
    """Writes a pair, one sequence per document, as Megatron's ``IndexedDatasetBuilder`` does.

    The names of the files end with ``.tmp`` until both are complete. The .idx is renamed last: a
    pair with an .idx is complete. After an error no file remains.

    Args:
        prefix: the path of the files without ``.bin`` and ``.idx``; its folder is made.
        parts: (a file of ids in the type ``optimal_dtype(vocab_size)``, the number of ids of each
            document in it).
        vocab_size: decides the type of the ids.
    """
    dtype = optimal_dtype(vocab_size)
    binary, index = Path(f"{prefix}.bin.tmp"), Path(f"{prefix}.idx.tmp")
    binary.parent.mkdir(parents=True, exist_ok=True)
    tables = [np.zeros(0, dtype=np.int32)]
    try:
        with binary.open("wb") as stream:
            for path, part in parts:
                tables.append(part)
                with path.open("rb") as ids:
                    shutil.copyfileobj(ids, stream, _CHUNK)
            _sync(stream)
        lengths = np.concatenate(tables).astype("<i4")
        pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
        code = next(code for code, name in CODES.items() if np.dtype(name) == dtype)
        with index.open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            stream.write(lengths.tobytes())
            stream.write(pointers.astype("<i8").tobytes())
            stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _sync(stream)
        # If the process ends here, no stale index remains beside the new ids.
        Path(f"{prefix}.idx").unlink(missing_ok=True)
        binary.replace(f"{prefix}.bin")
        index.replace(f"{prefix}.idx")
    finally:
        binary.unlink(missing_ok=True)
        index.unlink(missing_ok=True)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
