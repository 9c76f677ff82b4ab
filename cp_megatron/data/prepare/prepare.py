"""Turns text into Megatron's ``.bin/.idx`` with several processes; a stopped run can go on.

    inputs -> spans -> processes -> PREFIX.partial/000000-0.bin .. -> PREFIX_KEY_document.bin/.idx

A finished span is kept. The next run uses it if the manifest in the folder says that inputs,
tokenizer and options are the same. The result is the spans in their order, so neither the number of
processes nor an interruption changes a bit of it.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cp_megatron.data.prepare.prepare_worker import (
    OUTPUT,
    SpanProgress,
    cannot_write,
    ids_path,
    receipt_path,
    serve,
    write_json,
)
from cp_megatron.data.prepare.request import Request
from cp_megatron.data.read.documents import InputSpan, cut_spans, find_inputs, left_out
from cp_megatron.data.read.indexed import write_indexed
from cp_megatron.data.read.tables import FLAG
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.errors import ConfigError

MANIFEST = "manifest.json"
SMALLEST_SPAN, LARGEST_SPAN, SPANS = 1 << 20, 1 << 25, 256
SECONDS_TO_END = 5.0


@dataclass(frozen=True, kw_only=True)
class WorkAhead:
    """Bytes and number of all spans, and of those that an earlier run finished."""

    weight: int
    kept_weight: int
    spans: int
    kept_spans: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The pairs of files that were made.

    Attributes:
        outputs: the prefix of each pair.
        documents, tokens: the number in each pair.
        skipped: ``file:line: reason`` of each line, or file, that was skipped.
        notes: what the user should know about the tokenizer and the inputs.
    """

    outputs: tuple[str, ...]
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()


Watcher = Callable[[WorkAhead | SpanProgress], None]


def prepare(request: Request, watch: Watcher = lambda event: None) -> Prepared:
    """Makes the pairs.

    Args:
        request: the data to prepare.
        watch: called at the start and for every bit of progress.

    Raises:
        ConfigError: an input, the tokenizer, a line or the place of the output cannot be used.
        KeyboardInterrupt: passed on after the processes have ended; finished spans remain.
    """
    _check_request(request)
    tokenizer = tokenizer_of(request)
    if not _receipts(request.partial):
        _check_outputs(request)
    files = find_inputs(request.input)
    for file in files:
        if file.kind.format == "text" and request.json_keys != ("text",):
            rule = f"{file.path} is a text file and has no keys"
            raise ConfigError("--json-keys", " ".join(request.json_keys), rule, "text")
    total = sum(file.size for file in files)
    span_bytes = min(LARGEST_SPAN, max(SMALLEST_SPAN, total // SPANS))
    with _folder(request.partial):
        spans = list(cut_spans(files, span_bytes=span_bytes))
        manifest = {
            "inputs": [{"path": x.path, "size": x.size, "mtime": x.mtime} for x in files],
            "tokenizer": [tokenizer.kind, tokenizer.fingerprint],
            "options": [list(request.json_keys), request.append_eod],
            "pieces": len(spans),
            "skip_bad_lines": request.skip_bad_lines,
        }
        _go_on_or_begin(request, manifest)
        _run_spans(request, spans, watch)
        prepared = _join(request, spans, tokenizer.vocab_size)
    shutil.rmtree(request.partial)
    told = [file.kind.note for file in files if file.kind.note]
    return replace(prepared, notes=(*tokenizer.notes, *left_out(request.input), *told))


# ---- checks --------------------------------------------------------------------------------------


def _check_request(request: Request) -> None:
    if not request.input:
        raise ConfigError(FLAG, "", "needs the documents", f"{FLAG} FILE or FOLDER")
    if request.workers is not None and request.workers < 1:
        raise ConfigError("--workers", request.workers, "must be at least 1", "1 or more")
    keys = request.json_keys
    if len(set(keys)) != len(keys):
        raise ConfigError("--json-keys", " ".join(keys), "has a key twice", "each once")
    for key in keys:
        if "/" in key:
            rule = "is part of a file's name and must not hold a /"
            raise ConfigError("--json-keys", key, rule, "another key")


def _check_outputs(request: Request) -> None:
    """Refuses to overwrite a pair. A run that goes on may have made some of its pairs before."""
    for path in (prefix + suffix for prefix in request.outputs for suffix in (".idx", ".bin")):
        if os.path.exists(path):
            works = "another prefix, or delete the file"
            raise ConfigError(OUTPUT, request.output_prefix, f"{path} exists already", works)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Makes the folder of the spans and locks it for this run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        stream = (path / "lock").open("wb")
    except OSError as error:
        raise cannot_write(path, error) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            rule = "another run works in this folder"
            raise ConfigError(OUTPUT, str(path), rule, "wait for it, or another prefix") from None
        yield


def _receipts(folder: Path) -> list[Path]:
    """The receipts of the spans that an earlier run finished."""
    return list(folder.glob("[0-9]*.json"))


def _go_on_or_begin(request: Request, manifest: Mapping[str, Any]) -> None:
    """Keeps what an earlier run of the same task finished, or begins anew."""
    folder = request.partial
    path, kept = folder / MANIFEST, _receipts(folder)
    earlier: Any = None
    if kept and path.exists():
        try:
            earlier = json.loads(path.read_bytes())
        except ValueError:
            earlier = {}
        _check_same_task(folder, earlier, manifest)
    else:
        _check_outputs(request)
    try:
        # Receipts without a manifest come from a run that was killed while it deleted its folder.
        for useless in (*(kept if earlier is None else ()), *folder.glob("*.tmp")):
            useless.unlink()
        if earlier != manifest:
            write_json(path, manifest)
    except OSError as error:
        raise cannot_write(folder, error) from None


def _check_same_task(folder: Path, earlier: Any, manifest: Mapping[str, Any]) -> None:
    """Refuses spans in the folder that are of another task.

    Spans finished without ``--skip-bad-lines`` have no bad line, so they are the same with it.
    """
    names = {"inputs": "other inputs", "tokenizer": "another tokenizer"}
    names |= {"options": "other flags", "pieces": "other spans"}
    differing = [what for name, what in names.items() if earlier.get(name) != manifest[name]]
    if earlier.get("skip_bad_lines") and not manifest["skip_bad_lines"]:
        differing.append("--skip-bad-lines")
    if differing:
        rule = f"{folder} holds the unfinished work of a run with {differing[0]}"
        raise ConfigError(OUTPUT, str(folder), rule, f"rm -r {folder}, or another prefix")


# ---- spans ---------------------------------------------------------------------------------------


def _run_spans(request: Request, spans: Sequence[InputSpan], watch: Watcher) -> None:
    """Starts the processes and has them tokenise every span that is not finished."""
    folder = request.partial
    todo = [task for task in enumerate(spans) if not receipt_path(folder, task[0]).exists()]
    total, left = sum(span.weight for span in spans), sum(span.weight for _, span in todo)
    kept = len(spans) - len(todo)
    watch(WorkAhead(weight=total, kept_weight=total - left, spans=len(spans), kept_spans=kept))
    # Spawned, because a process that is forked from one with threads may hang.
    context = multiprocessing.get_context("spawn")
    team: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(min(request.workers or cores(), len(todo))):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, request), daemon=True)
            process.start()
            theirs.close()
            team[ours] = process
        _deal(team, todo, watch)
    finally:
        for connection in team:
            connection.close()
        for process in team.values():
            process.join(SECONDS_TO_END if not todo else 0)
            process.terminate()
            process.join()


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _deal(
    team: Mapping[Connection, SpawnProcess], todo: list[tuple[int, InputSpan]], watch: Watcher
) -> None:
    """Gives a span to each process that asks for one; takes the spans out of ``todo``."""
    todo.reverse()
    busy = set(team)
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            try:
                answer = ready.recv()
                if answer is None and todo:
                    ready.send(todo.pop())
                elif answer is None:
                    busy.remove(ready)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                team[ready].join(SECONDS_TO_END)
                code = team[ready].exitcode
                rule = f"a process ended with code {code}, perhaps because memory ran out"
                works = "the same command with fewer --workers; finished work is kept"
                raise ConfigError("--workers", "", rule, works) from None
            if isinstance(answer, Exception):
                raise answer
            if answer is not None:
                watch(answer)


# ---- the result ----------------------------------------------------------------------------------


def _join(request: Request, spans: Sequence[InputSpan], vocab_size: int) -> Prepared:
    """Writes the spans one after the other."""
    folder = request.partial
    receipts = [json.loads(receipt_path(folder, n).read_bytes()) for n in range(len(spans))]
    tokens, documents = (
        tuple(sum(each[name][key] for each in receipts) for key in range(len(request.json_keys)))
        for name in ("tokens", "documents")
    )
    if 0 in tokens:
        rule = f"no document has any text under the key {request.json_keys[tokens.index(0)]!r}"
        raise ConfigError(FLAG, " ".join(request.input), rule, "documents with text")
    try:
        for key, prefix in enumerate(request.outputs):
            parts = (_checked(folder, number, key, each) for number, each in enumerate(receipts))
            write_indexed(prefix, parts, vocab_size=vocab_size)
    except OSError as error:
        raise cannot_write(request.output_prefix, error) from None
    skipped = tuple(_skipped(spans, receipts))
    return Prepared(outputs=request.outputs, documents=documents, tokens=tokens, skipped=skipped)


def _checked(
    folder: Path, number: int, key: int, receipt: Mapping[str, Any]
) -> tuple[Path, npt.NDArray[np.int32]]:
    """The ids of a span and the lengths of its documents, compared with the receipt.

    After a loss of power, files may have their names and not their contents.
    """
    path, check = ids_path(folder, number, key), 0
    lengths = np.fromfile(path.with_suffix(".len"), dtype="<i4")
    with path.open("rb") as stream:
        while data := stream.read(SMALLEST_SPAN):
            check = zlib.crc32(data, check)
    good = (check, len(lengths), int(lengths.sum(dtype=np.int64)))
    if good != tuple(receipt[name][key] for name in ("crc32", "documents", "tokens")):
        receipt_path(folder, number).unlink()
        rule = f"the finished span {number} in it was damaged and is now deleted"
        works = "run the same command again to rebuild it"
        raise ConfigError(OUTPUT, str(folder), rule, works)
    return path, lengths


def _skipped(spans: Sequence[InputSpan], receipts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The skipped lines, numbered within the whole file."""
    path, before = "", 0
    for span, receipt in zip(spans, receipts):
        if span.paths[0] != path or span.start == 0:
            path, before = span.paths[0], 0
        for line, reason in receipt["skipped"]:
            yield f"{path}:{before + line}: {reason}" if line else reason
        before += receipt["lines"]
