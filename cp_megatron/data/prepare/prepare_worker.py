"""A process of ``prepare_data``: takes spans from a pipe and leaves their ids in files.

For span 12 and the keys 0, 1, ..: ``000012-0.bin`` (the ids), ``000012-0.len`` (int32, the number
of ids of each document), and last ``000012.json``, the receipt. A span without a receipt is not
finished.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cp_megatron.data.prepare.request import Request
from cp_megatron.data.read.documents import InputSpan, read_span
from cp_megatron.data.read.indexed import optimal_dtype
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

OUTPUT = "--output-prefix"
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)
"""What the pipe raises when the parent has ended or closed it."""


@dataclass(frozen=True, kw_only=True)
class SpanProgress:
    """A part of a span is tokenised: bytes read, ids, documents."""

    weight: int
    tokens: int
    documents: int


def receipt_path(folder: Path, number: int) -> Path:
    """The file that says that a span is done."""
    return folder / f"{number:06d}.json"


def ids_path(folder: Path, number: int, key: int) -> Path:
    """The ids of a span under a key."""
    return folder / f"{number:06d}-{key}.bin"


def cannot_write(path: object, error: OSError) -> ConfigError:
    """The error for a folder or a disk that cannot be written."""
    rule = f"cannot be written: {error.strerror}"
    return ConfigError(OUTPUT, str(path), rule, "a writable folder on a disk with more space")


def serve(connection: Connection, request: Request) -> None:
    """Tokenises spans until the pipe closes.

    None asks for the next (number, span); each part of it is reported by ``SpanProgress``. An error
    is sent as an exception, after which the process ends.
    """
    # Ctrl-C reaches all processes of the terminal; the parent ends this one by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(*_GONE):
        try:
            tokenizer = tokenizer_of(request)
            while True:
                connection.send(None)
                number, span = connection.recv()
                tokenise_span(number, span, request, tokenizer, connection)
        except _GONE:
            raise
        except ConfigError as error:
            connection.send(error)
        except OSError as error:
            connection.send(cannot_write(request.partial, error))
        except Exception:
            connection.send(RuntimeError(f"a process failed:\n{traceback.format_exc()}"))


def tokenise_span(
    number: int, span: InputSpan, request: Request, tokenizer: Tokenizer, connection: Connection
) -> None:
    """Writes the files of a span, the receipt last."""
    folder, keys = request.partial, request.json_keys
    # The names hold the process, because a process that lost its parent may still write.
    suffix = f".{os.getpid()}.tmp"
    outputs = [ids_path(folder, number, key) for key in range(len(keys))]
    streams = [open(f"{path}{suffix}", "wb") for path in outputs]  # noqa: SIM115
    lengths: list[list[int]] = [[] for _ in keys]
    checks = [0 for _ in keys]
    skipped: list[tuple[int, str]] = []
    lines = 0
    try:
        for batch in read_span(span, keys, skip_bad_lines=request.skip_bad_lines):
            tokens = documents = 0
            for key, texts in enumerate(batch.texts):
                data, sizes = _encoded(texts, tokenizer, request.append_eod)
                streams[key].write(data)
                checks[key] = zlib.crc32(data, checks[key])
                lengths[key] += sizes
                tokens, documents = tokens + sum(sizes), documents + len(sizes)
            connection.send(SpanProgress(weight=batch.weight, tokens=tokens, documents=documents))
            skipped += batch.skipped
            lines += batch.lines
    finally:
        for stream in streams:
            stream.close()
    for key, path in enumerate(outputs):
        Path(f"{path}{suffix}").replace(path)
        path.with_suffix(".len").write_bytes(np.array(lengths[key], dtype="<i4").tobytes())
    receipt = {
        "documents": [len(each) for each in lengths],
        "tokens": [sum(each) for each in lengths],
        "crc32": checks,
        "lines": lines,
        "skipped": skipped,
    }
    write_json(receipt_path(folder, number), receipt, suffix)


def write_json(path: Path, value: Mapping[str, Any], suffix: str = ".tmp") -> None:
    """Writes a file that is complete as soon as it exists."""
    unfinished = Path(f"{path}{suffix}")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    unfinished.replace(path)


def _encoded(
    texts: Sequence[str], tokenizer: Tokenizer, append_eod: bool
) -> tuple[bytes, list[int]]:
    """The ids of the documents, and the number of ids of each; those without ids are left out."""
    end = np.full(int(append_eod), tokenizer.eod, dtype=np.int32)
    # Not as a batch: the processes share the cores, so a library's threads would add nothing.
    encoded = [ids for text in texts if (ids := tokenizer.encode(text)).size]
    joined = np.concatenate([end[:0], *(part for ids in encoded for part in (ids, end))])
    data = joined.astype(optimal_dtype(tokenizer.vocab_size)).tobytes()
    return data, [ids.size + end.size for ids in encoded]
