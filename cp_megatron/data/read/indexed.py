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

Nothing here imports torch. Everything that can be wrong with the pair is found at ``open``, except
ids that were changed in place: ``check_vocabulary`` reads them all.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES: Mapping[int, str] = MappingProxyType(
    {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
)
"""Code of a type in the header -> numpy's name of it."""
LARGEST_VOCAB_OF_UINT16 = 65500
"""From this size on Megatron's writer takes int32."""
WORKS = "a pair PREFIX.bin and PREFIX.idx, made by launch/prepare_data.py or by Megatron-LM"
CHUNK = 1 << 24
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, kw_only=True)
class IndexedDataset:
    """A pair that was checked. ``open`` makes one.

    Attributes:
        prefix: path of the two files without ``.bin`` and ``.idx``.
        dtype: type of the ids.
        lengths: int32 [sequences], ids in each.
        pointers: int64 [sequences], where each begins, in bytes; they follow one another.
        document_index: int64 [documents + 1], the first sequence of each document, then their
            number. Sequence i belongs to the last document whose entry is at most i.
        tokens: [n] of ``dtype``, all ids, mapped from the file and read-only.
        fingerprint: SHA-256 (hex) of the .idx, the .bin's size and samples of it.
    """

    prefix: str
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    document_index: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any]
    fingerprint: str

    @classmethod
    def open(cls, prefix: str, *, flag: str = "--data-path") -> IndexedDataset:
        """Opens and checks a pair; the ids themselves are not read but for a few samples.

        Args:
            prefix: path of the files without ``.bin`` and ``.idx``.
            flag: the flag that named it.

        Raises:
            ConfigError: names the file and what is wrong with it.
        """
        index, binary = (_regular_file(prefix, suffix, flag) for suffix in (".idx", ".bin"))
        try:
            data = _mapped(index)
            found = _parse(data)
            size = os.path.getsize(binary)
            _check_size(found, size)
            tokens = np.memmap(binary, dtype=found.dtype, mode="r")
            fingerprint = _fingerprint(data, binary, size)
        except _MalformedError as error:
            file = binary if error.of_binary else index
            raise ConfigError(flag, file, str(error), WORKS) from None
        except OSError as error:
            rule = f"can not be read: {error.strerror}"
            raise ConfigError(flag, prefix, rule, WORKS) from None
        return cls(
            prefix=prefix,
            dtype=found.dtype,
            lengths=found.lengths,
            pointers=found.pointers,
            document_index=found.document_index,
            tokens=tokens,
            fingerprint=fingerprint,
        )

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 [sequences], where each sequence begins in ``tokens``."""
        return self.pointers // self.dtype.itemsize

    def sequence(self, number: int) -> npt.NDArray[Any]:
        """The ids of one sequence, a view of the file."""
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[number])]

    def check_vocabulary(self, vocab_size: int, *, flag: str = "--data-path") -> None:
        """Reads all ids, in pieces.

        Args:
            vocab_size: ids must lie in [0, vocab_size).
            flag: the flag that named the data.

        Raises:
            ConfigError: tells the first id that does not, and where.
        """
        kind = np.iinfo(self.dtype)
        if kind.min >= 0 and kind.max < vocab_size:
            return
        for start in range(0, len(self.tokens), CHUNK):
            piece = self.tokens[start : start + CHUNK]
            if int(piece.min()) >= 0 and int(piece.max()) < vocab_size:
                continue
            place = int(np.flatnonzero((piece < 0) | (piece >= vocab_size))[0])
            where = start + place
            sequence = int(np.searchsorted(self.starts, where, side="right")) - 1
            rule = (
                f"id {int(piece[place])} at position {where} (sequence {sequence}) lies outside "
                f"the vocabulary of {vocab_size}"
            )
            works = "the tokenizer that the data was made with"
            raise ConfigError(flag, f"{self.prefix}.bin", rule, works)


class _MalformedError(Exception):
    """What is wrong with a pair; ``of_binary``: with its .bin."""

    def __init__(self, rule: str, *, of_binary: bool = False) -> None:
        self.of_binary = of_binary
        super().__init__(rule)


@dataclass(frozen=True, kw_only=True)
class _Index:
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    document_index: npt.NDArray[np.int64]


def _parse(data: memoryview) -> _Index:
    """The contents of an .idx, checked."""
    if len(data) < HEADER.size:
        raise _MalformedError(
            f"is truncated: {len(data)} bytes, the header alone has {HEADER.size}"
        )
    magic, version, code, sequences, entries = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise _MalformedError("does not begin as an index of Megatron does (MMIDIDX)")
    if version != VERSION:
        raise _MalformedError(f"has version {version}, only {VERSION} is known")
    if code not in CODES:
        raise _MalformedError(f"has code {code} for the type of its ids, known are 1 to 8")
    dtype = np.dtype(CODES[code])
    if dtype.kind not in "iu":
        raise _MalformedError(f"says that its entries are {dtype.name}, ids are whole numbers")
    size = HEADER.size + 12 * sequences + 8 * entries
    if len(data) not in (size, size + sequences):
        how = "truncated" if len(data) < size else "too long"
        raise _MalformedError(
            f"is {how}: {len(data)} bytes, {sequences} sequences and {entries} entries of the "
            f"document index need {size}"
        )
    # Copies, as the tables lie at odd addresses of the file.
    after = HEADER.size
    lengths = np.frombuffer(data, dtype="<i4", count=sequences, offset=after).copy()
    after += 4 * sequences
    pointers = np.frombuffer(data, dtype="<i8", count=sequences, offset=after).copy()
    after += 8 * sequences
    documents = np.frombuffer(data, dtype="<i8", count=entries, offset=after).copy()
    _check_tables(lengths, pointers, documents, dtype.itemsize)
    for table in (lengths, pointers, documents):
        table.setflags(write=False)
    return _Index(dtype=dtype, lengths=lengths, pointers=pointers, document_index=documents)


def _check_tables(
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    itemsize: int,
) -> None:
    if lengths.size and int(lengths.min()) < 0:
        place = int(np.flatnonzero(lengths < 0)[0])
        raise _MalformedError(f"gives sequence {place} the length {int(lengths[place])}")
    expected = np.cumsum(lengths, dtype=np.int64) * itemsize - lengths.astype(np.int64) * itemsize
    if not np.array_equal(expected, pointers):
        place = int(np.flatnonzero(expected != pointers)[0])
        raise _MalformedError(
            f"says that sequence {place} begins at byte {int(pointers[place])}; the lengths before "
            f"it add up to {int(expected[place])}"
        )
    if documents.size == 0 or int(documents[0]) != 0:
        raise _MalformedError("has a document index that does not begin with 0")
    if (documents[1:] < documents[:-1]).any():
        place = int(np.flatnonzero(documents[1:] < documents[:-1])[0])
        raise _MalformedError(f"has a document index that goes back at entry {place + 1}")
    if int(documents[-1]) != len(lengths):
        raise _MalformedError(
            f"has a document index that ends with {int(documents[-1])}, there are {len(lengths)} "
            "sequences"
        )


def _check_size(index: _Index, size: int) -> None:
    """Compares the .bin's bytes with what the index says."""
    total = int(index.lengths.sum(dtype=np.int64))
    if total == 0:
        raise _MalformedError("holds no ids")
    if size != total * index.dtype.itemsize:
        raise _MalformedError(
            f"has {size} bytes, its .idx says {total} ids of {index.dtype.itemsize} bytes",
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
        cut = prefix[: -len(suffix)] if prefix.endswith((".bin", ".idx")) else ""
        works = f"{flag} {cut}" if cut else WORKS
        raise ConfigError(flag, path, "there is no such file", works) from None
    if not stat.S_ISREG(mode):
        raise ConfigError(flag, path, "must be a regular file", WORKS)
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
    """The type Megatron's writer takes for ids of a vocabulary: uint16 below 65,500, else int32."""
    return np.dtype("<u2" if vocab_size < LARGEST_VOCAB_OF_UINT16 else "<i4")


class IndexedWriter:
    """Writes a pair, one sequence per document, as Megatron's ``IndexedDatasetBuilder`` does.

    The files have ``.tmp`` at the end of their names until ``finalize``; the .idx comes last, so
    where it lies the pair is whole. A context manager: left without ``finalize``, nothing remains.

    Args:
        prefix: path of the files without ``.bin`` and ``.idx``; its folder is made.
        vocab_size: decides the type of the ids, see ``optimal_dtype``.
        flag: the flag that named ``prefix``.
    """

    def __init__(self, prefix: str, *, vocab_size: int, flag: str = "--output-prefix") -> None:
        self.prefix = prefix
        self.dtype = optimal_dtype(vocab_size)
        self._flag = flag
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._binary, self._index = Path(f"{prefix}.bin.tmp"), Path(f"{prefix}.idx.tmp")
        self._binary.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._binary.open("wb")

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._binary.unlink(missing_ok=True)
        self._index.unlink(missing_ok=True)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends one document, integers [n].

        Raises:
            ConfigError: it has 2**31 ids or more, which the format can not tell.
            ValueError: an id does not fit into the type.
        """
        values = np.asarray(tokens)
        if values.size > np.iinfo(np.int32).max:
            rule = f"a document of {values.size} ids is too long for the format (2**31 - 1)"
            raise ConfigError(self._flag, self.prefix, rule, "shorter documents")
        kind = np.iinfo(self.dtype)
        if values.size and not (kind.min <= int(values.min()) and int(values.max()) <= kind.max):
            raise ValueError(f"an id does not fit into {self.dtype.name}")
        self._stream.write(values.astype(self.dtype).tobytes())
        self._lengths.append(np.array([values.size], dtype=np.int32))

    def add_file(self, path: Path, lengths: npt.NDArray[np.int32]) -> None:
        """Appends many documents: ``path`` holds their ids in this writer's type."""
        with path.open("rb") as stream:
            while piece := stream.read(CHUNK):
                self._stream.write(piece)
        self._lengths.append(lengths.astype(np.int32))

    def finalize(self) -> None:
        """Writes the index and gives both files their names."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        lengths = np.concatenate([np.zeros(0, dtype=np.int32), *self._lengths]).astype("<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        pointers = (ends - lengths.astype("<i8") * self.dtype.itemsize).astype("<i8")
        code = next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        with self._index.open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            stream.write(lengths.tobytes())
            stream.write(pointers.tobytes())
            stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        index = Path(f"{self.prefix}.idx")
        # An older index must not lie beside the new ids, should this be the end.
        index.unlink(missing_ok=True)
        self._binary.replace(f"{self.prefix}.bin")
        self._index.replace(index)
