"""One process of ``prepare_data``: takes pieces from a pipe, leaves their ids in files. No torch.

For piece 12 and the keys 0, 1, ..: ``000012-0.bin`` (the ids), ``000012-0.len`` (int32, ids of each
document), and last ``000012.json``, the receipt. A piece without a receipt is not finished.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.documents import Bundle, Piece, read_piece
from cp_megatron.data.read.indexed import optimal_dtype
from cp_megatron.data.tokenize.tokenizer import Tokenizer, open_tokenizer
from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with every piece.

    Attributes:
        folder: where the ids of pieces go.
        tokenizer_type, tokenizer_model: as in ``open_tokenizer``.
        keys: keys of JSON objects, or columns of tables.
        append_eod: documents end with the tokenizer's ``eod``.
        skip_bad_lines: malformed lines are skipped and told of.
    """

    folder: Path
    tokenizer_type: str
    tokenizer_model: str | None
    keys: tuple[str, ...]
    append_eod: bool
    skip_bad_lines: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """What became of some more of a piece, for the progress: bytes read, ids, documents."""

    weight: int
    tokens: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A piece is done."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The process can not go on: the user's mistake, or the trace of our own."""

    error: ConfigError | None
    trace: str


def receipt_path(folder: Path, number: int) -> Path:
    """The file that says that a piece is done."""
    return folder / f"{number:06d}.json"


def ids_path(folder: Path, number: int, key: int) -> Path:
    """The ids of a piece under a key."""
    return folder / f"{number:06d}-{key}.bin"


def lengths_path(folder: Path, number: int, key: int) -> Path:
    """The ids of each document of a piece under a key."""
    return folder / f"{number:06d}-{key}.len"


def serve(connection: Connection, job: Job) -> None:
    """Answers (number, piece) with ``Step`` .. ``Finished`` until the pipe closes."""
    # Ctrl-C reaches the whole terminal; the parent ends this process by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        tokenizer = open_tokenizer(job.tokenizer_type, job.tokenizer_model)
        while True:
            number, piece = connection.recv()
            tokenise_piece(number, piece, job, tokenizer, connection)
            connection.send(Finished(number=number))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except ConfigError as error:
        connection.send(Failed(error=error, trace=""))
    except OSError as error:
        rule = f"can not be written: {error.strerror}"
        told = ConfigError("--output-prefix", str(job.folder), rule, "a disk with room")
        connection.send(Failed(error=told, trace=""))
    except Exception:
        connection.send(Failed(error=None, trace=traceback.format_exc()))


def tokenise_piece(
    number: int, piece: Piece, job: Job, tokenizer: Tokenizer, connection: Connection
) -> None:
    """Writes the files of a piece, the receipt last."""
    # With the process in their names, as one that lost its parent may still write.
    suffix = f".{os.getpid()}.tmp"
    outputs = [ids_path(job.folder, number, key) for key in range(len(job.keys))]
    streams = [open(f"{path}{suffix}", "wb") for path in outputs]  # noqa: SIM115
    lengths: list[list[int]] = [[] for _ in job.keys]
    checks = [0 for _ in job.keys]
    skipped: list[tuple[int, str]] = []
    lines = 0
    try:
        for bundle in read_piece(piece, job.keys, skip_bad_lines=job.skip_bad_lines):
            step, checks = _write(bundle, tokenizer, job.append_eod, streams, lengths, checks)
            connection.send(step)
            skipped += bundle.skipped
            lines += bundle.lines
    finally:
        for stream in streams:
            stream.close()
    for key, path in enumerate(outputs):
        Path(f"{path}{suffix}").replace(path)
        lengths_path(job.folder, number, key).write_bytes(
            np.array(lengths[key], dtype="<i4").tobytes()
        )
    receipt = {
        "documents": [len(each) for each in lengths],
        "tokens": [sum(each) for each in lengths],
        "crc32": checks,
        "lines": lines,
        "skipped": skipped,
    }
    write_json(receipt_path(job.folder, number), receipt, suffix)


def write_json(path: Path, value: Mapping[str, Any], suffix: str = ".tmp") -> None:
    """Writes a file that is whole as soon as it is there."""
    unfinished = Path(f"{path}{suffix}")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    unfinished.replace(path)


def _write(
    bundle: Bundle,
    tokenizer: Tokenizer,
    append_eod: bool,
    streams: Sequence[BinaryIO],
    lengths: Sequence[list[int]],
    checks: Sequence[int],
) -> tuple[Step, list[int]]:
    """Appends the documents of a bundle; the CRC-32 of what was written so far, for each key."""
    dtype = optimal_dtype(tokenizer.vocab_size)
    end = np.full(int(append_eod), tokenizer.eod, dtype=np.int32)
    tokens = documents = 0
    after = []
    for texts, stream, sizes, check in zip(bundle.texts, streams, lengths, checks):
        # One by one: the cores are shared out among processes, not among a library's threads.
        found = [ids for text in texts if (ids := tokenizer.encode(text)).size]
        parts: list[npt.NDArray[np.int32]] = [part for ids in found for part in (ids, end)]
        joined = np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)
        data = joined.tobytes()
        stream.write(data)
        sizes += [ids.size + end.size for ids in found]
        after.append(zlib.crc32(data, check))
        tokens, documents = tokens + joined.size, documents + len(found)
    return Step(weight=bundle.weight, tokens=tokens, documents=documents), after
