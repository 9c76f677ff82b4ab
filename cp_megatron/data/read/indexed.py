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
import stat
import struct
from collections.abc import Mapping
from contextlib import AbstractContextManager
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
LARGEST_VOCAB_OF_UINT16 = 65500
"""Megatron's writer uses int32 from this size on."""
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
        index, binary = (_regular_file(prefix, suffix, flag) for suffix in (".idx", ".bin"))
        try:
            data, size = _mapped(index), os.path.getsize(binary)
            dtype, lengths, document_index = _parse(data)
            _check_size(lengths, dtype, size)
            return cls(
                prefix=prefix,
                lengths=lengths,
                starts=np.cumsum(lengths, dtype=np.int64) - lengths,
                document_index=document_index,
                tokens=np.memmap(binary, dtype=dtype, mode="r"),
                fingerprint=_fingerprint(data, binary, size),
            )
        except _MalformedError as error:
            file = binary if error.of_binary else index
            raise ConfigError(flag, file, str(error), _WORKS) from None
        except OSError as error:
            raise ConfigError(flag, prefix, f"cannot be read: {error.strerror}", _WORKS) from None

    def check_vocabulary(self, vocab_size: int, *, flag: str = "--data-path") -> None:
        """Reads all ids, a chunk at a time.

        Args:
            vocab_size: ids must lie in [0, vocab_size).
            flag: the flag that named the data.

        Raises:
            ConfigError: names the first id that does not, and its place.
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
            rule = (
                f"id {int(chunk[place])} at position {where} (sequence {sequence}) lies outside "
                f"the vocabulary of {vocab_size}"
            )
            works = "the tokenizer that the data was made with"
            raise ConfigError(flag, f"{self.prefix}.bin", rule, works)


class _MalformedError(Exception):
    """Says what is wrong with a pair; ``of_binary``: with its .bin."""

    def __init__(self, rule: str, *, of_binary: bool = False) -> None:
        self.of_binary = of_binary
        super().__init__(rule)


def _parse(
    data: memoryview,
) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The type of the ids, the lengths and the document index of an .idx, checked."""
    if len(data) < HEADER.size:
        raise _MalformedError(
            f"is truncated: {len(data)} bytes, the header alone has {HEADER.size}"
        )
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
        how = "truncated" if len(data) < size else "too long"
        raise _MalformedError(
            f"is {how}: {len(data)} bytes, but {sequences} sequences and {entries} entries of the "
            f"document index need {size}"
        )
    # Copies, because the tables lie at odd addresses of the file.
    after = HEADER.size
    lengths = np.frombuffer(data, dtype="<i4", count=sequences, offset=after).copy()
    after += 4 * sequences
    pointers = np.frombuffer(data, dtype="<i8", count=sequences, offset=after).copy()
    after += 8 * sequences
    documents = np.frombuffer(data, dtype="<i8", count=entries, offset=after).copy()
    _check_tables(lengths, pointers, documents, dtype.itemsize)
    for table in (lengths, documents):
        table.setflags(write=False)
    return dtype, lengths, documents


def _check_tables(
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    itemsize: int,
) -> None:
    if lengths.size and int(lengths.min()) < 0:
        place = int(np.flatnonzero(lengths < 0)[0])
        raise _MalformedError(f"gives sequence {place} the length {int(lengths[place])}")
    expected = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    if not np.array_equal(expected, pointers):
        place = int(np.flatnonzero(expected != pointers)[0])
        raise _MalformedError(
            f"says that sequence {place} begins at byte {int(pointers[place])}, but the lengths "
            f"before it add up to {int(expected[place])}"
        )
    if documents.size == 0 or int(documents[0]) != 0:
        raise _MalformedError("has a document index that does not begin with 0")
    if (documents[1:] < documents[:-1]).any():
        place = int(np.flatnonzero(documents[1:] < documents[:-1])[0])
        raise _MalformedError(f"has a document index that decreases at entry {place + 1}")
    if int(documents[-1]) != len(lengths):
        raise _MalformedError(
            f"has a document index that ends with {int(documents[-1])}, but there are "
            f"{len(lengths)} sequences"
        )


def _check_size(lengths: npt.NDArray[np.int32], dtype: np.dtype[Any], size: int) -> None:
    """Compares the size of the .bin with the index."""
    total = int(lengths.sum(dtype=np.int64))
    if total == 0:
        raise _MalformedError("holds no ids")
    if size != total * dtype.itemsize:
        raise _MalformedError(
            f"has {size} bytes, but its .idx says {total} ids of {dtype.itemsize} bytes",
            of_binary=True,
        )


def _mapped(path: str) -> memoryview:
    """The bytes of a file, which may be empty."""
    if os.path.getsize(path) == 0:
        return memoryview(b"")
    data: Any = np.memmap(path, dtype=np.uint8, mode="r")
    return memoryview(data)


def _regular_file(prefix: str, suffix: str, flag: str) -> str:
    path = prefix + suffix
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        raise ConfigError(flag, path, "there is no such file", _WORKS) from None
    if not stat.S_ISREG(mode):
        raise ConfigError(flag, path, "must be a regular file", _WORKS)
    return path


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
    return np.dtype("<u2" if vocab_size < LARGEST_VOCAB_OF_UINT16 else "<i4")


class IndexedWriter(AbstractContextManager["IndexedWriter"]):
    """Writes a pair, one sequence per document, as Megatron's ``IndexedDatasetBuilder`` does.

    The names of the files end with ``.tmp`` until ``finalize``, which renames the .idx last: a pair
    with an .idx is complete. A writer that is left without ``finalize`` removes its files.

    Args:
        prefix: the path of the files without ``.bin`` and ``.idx``; its folder is made.
        vocab_size: decides the type of the ids, see ``optimal_dtype``.
    """

    def __init__(self, prefix: str, *, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = optimal_dtype(vocab_size)
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._binary, self._index = Path(f"{prefix}.bin.tmp"), Path(f"{prefix}.idx.tmp")
        self._binary.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._binary.open("wb")

    def __exit__(self, *raised: object) -> None:
        self._stream.close()
        self._binary.unlink(missing_ok=True)
        self._index.unlink(missing_ok=True)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends one document, integers [n].

        Raises:
            ValueError: an id does not fit into the type.
        """
        values = np.asarray(tokens)
        kind = np.iinfo(self.dtype)
        if values.size and not (kind.min <= int(values.min()) and int(values.max()) <= kind.max):
            raise ValueError(f"an id does not fit into {self.dtype.name}")
        self._stream.write(values.astype(self.dtype).tobytes())
        self._lengths.append(np.array([values.size], dtype=np.int32))

    def add_file(self, path: Path, lengths: npt.NDArray[np.int32]) -> None:
        """Appends many documents: ``path`` holds their ids in this writer's type."""
        with path.open("rb") as stream:
            shutil.copyfileobj(stream, self._stream, _CHUNK)
        self._lengths.append(lengths.astype(np.int32))

    def finalize(self) -> None:
        """Writes the index and gives both files their names."""
        _sync(self._stream)
        self._stream.close()
        lengths = np.concatenate([np.zeros(0, dtype=np.int32), *self._lengths]).astype("<i4")
        pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * self.dtype.itemsize
        code = next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        with self._index.open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            stream.write(lengths.tobytes())
            stream.write(pointers.astype("<i8").tobytes())
            stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _sync(stream)
        index = Path(f"{self.prefix}.idx")
        # Should the process end here, no older index lies beside the new ids.
        index.unlink(missing_ok=True)
        self._binary.replace(f"{self.prefix}.bin")
        self._index.replace(index)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
