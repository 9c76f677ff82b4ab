"""Text to Megatron's ``.bin/.idx``, by several processes, in a way that goes on after a kill.

    inputs -> pieces -> processes -> PREFIX.partial/000000-0.bin .. -> PREFIX_KEY_document.bin/.idx

A finished piece is kept. The next run finds it, if the manifest in the folder says that inputs,
tokenizer and options are the same. The result is the pieces in their order, so neither the number
of processes nor a kill changes a bit of it. No torch.
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
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np

from cp_megatron.data.prepare.prepare_worker import (
    Failed,
    Finished,
    Job,
    Step,
    ids_path,
    lengths_path,
    receipt_path,
    serve,
    write_json,
)
from cp_megatron.data.read.documents import FLAG, Piece, cut_pieces, find_sources
from cp_megatron.data.read.indexed import IndexedWriter
from cp_megatron.data.tokenize.tokenizer import open_tokenizer
from cp_megatron.errors import ConfigError

OUTPUT = "--output-prefix"
MANIFEST = "manifest.json"
SMALLEST_PIECE, LARGEST_PIECE, PIECES = 1 << 20, 1 << 25, 256
SECONDS_TO_END = 5.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to prepare.

    Attributes:
        inputs: files, folders, patterns with * and ?.
        output_prefix: a key's files are ``<output_prefix>_<key>_document.bin`` and ``.idx``.
        tokenizer_type, tokenizer_model: as in ``open_tokenizer``.
        keys: keys of JSON objects or columns of tables; ``text`` for files of text.
        append_eod: documents end with the tokenizer's ``eod``.
        workers: processes; None is one for each core.
        skip_bad_lines: malformed lines are skipped and told of.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    workers: int | None = None
    skip_bad_lines: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """The prefix of each key's files."""
        return tuple(f"{self.output_prefix}_{key}_document" for key in self.keys)

    @property
    def partial(self) -> Path:
        """The folder of the finished pieces."""
        return Path(f"{self.output_prefix}.partial")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What lies ahead: bytes of all pieces and of those that an earlier run left, pieces."""

    weight: int
    kept_weight: int
    pieces: int
    kept_pieces: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was made.

    Attributes:
        outputs: prefixes of the pairs.
        documents, tokens: of each.
        skipped: ``file:line: reason`` of what could not be read.
    """

    outputs: tuple[str, ...]
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    skipped: tuple[str, ...]


Watcher = Callable[[Start | Step], None]


def prepare(request: Request, watch: Watcher = lambda event: None) -> Result:
    """Makes the pairs.

    Args:
        request: what to prepare.
        watch: is told of the start and of every step.

    Raises:
        ConfigError: an input, the tokenizer, a line or the place of the output can not be used.
        KeyboardInterrupt: passed on after the processes have ended; finished pieces remain.
    """
    _check_request(request)
    tokenizer = open_tokenizer(request.tokenizer_type, request.tokenizer_model)
    if not _receipts(request.partial):
        _check_outputs(request)
    found = find_sources(request.inputs)
    if request.keys != ("text",) and any(kind == "text" for kind, _, _ in found):
        path = next(source.path for kind, source, _ in found if kind == "text")
        rule = f"{path} is a file of text and has no keys"
        raise ConfigError("--json-keys", " ".join(request.keys), rule, "text")
    total = sum(source.size for _, source, _ in found)
    piece_bytes = min(LARGEST_PIECE, max(SMALLEST_PIECE, total // PIECES))
    with _folder(request.partial):
        pieces = list(cut_pieces(found, piece_bytes=piece_bytes))
        manifest = {
            "inputs": [asdict(source) for _, source, _ in found],
            "tokenizer": [tokenizer.kind, tokenizer.fingerprint],
            "options": [list(request.keys), request.append_eod],
            "pieces": len(pieces),
            "skip_bad_lines": request.skip_bad_lines,
        }
        _go_on_or_begin(request, manifest)
        _run_pieces(request, pieces, watch)
        result = _join(request, pieces, tokenizer.vocab_size)
    shutil.rmtree(request.partial)
    return result


# ---- checks --------------------------------------------------------------------------------------


def _check_request(request: Request) -> None:
    if not request.inputs:
        raise ConfigError(FLAG, "", "needs the documents", f"{FLAG} FILE or FOLDER")
    if request.workers is not None and request.workers < 1:
        raise ConfigError("--workers", request.workers, "must be at least 1", "1 or more")
    if len(set(request.keys)) != len(request.keys):
        raise ConfigError("--json-keys", " ".join(request.keys), "has a key twice", "each once")
    for key in request.keys:
        if "/" in key:
            raise ConfigError("--json-keys", key, "is part of a file's name: no /", "another key")


def _check_outputs(request: Request) -> None:
    """Refuses to overwrite a pair. A run that goes on may have made the first of several."""
    for prefix in request.outputs:
        for suffix in (".idx", ".bin"):
            if os.path.exists(prefix + suffix):
                rule = f"{prefix + suffix} is there already"
                works = "another prefix, or delete the file"
                raise ConfigError(OUTPUT, request.output_prefix, rule, works)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """The folder of the pieces, held by this run alone."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        stream = (path / "lock").open("wb")
    except OSError as error:
        rule = f"can not be written: {error.strerror}"
        raise ConfigError(OUTPUT, str(path), rule, "a folder that can be written") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            rule = "another run is at work in this folder"
            raise ConfigError(OUTPUT, str(path), rule, "wait for it, or another prefix") from None
        yield


def _receipts(folder: Path) -> list[Path]:
    """Those of the pieces that an earlier run finished."""
    return list(folder.glob("[0-9]*.json"))


def _go_on_or_begin(request: Request, manifest: Mapping[str, Any]) -> None:
    """Keeps what an earlier run of the same task finished; without any, begins anew."""
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
        # Receipts without a manifest were left by a run that was killed while it tidied up.
        for useless in (*(kept if earlier is None else ()), *folder.glob("*.tmp")):
            useless.unlink()
        if earlier != manifest:
            write_json(path, manifest)
    except OSError as error:
        rule = f"can not be written: {error.strerror}"
        raise ConfigError(OUTPUT, str(folder), rule, "a disk with room") from None


def _check_same_task(folder: Path, earlier: Any, manifest: Mapping[str, Any]) -> None:
    """Whether an earlier run's pieces in the folder are of the same task.

    Those finished without ``--skip-bad-lines`` have no bad line, so they are the same with it.
    """
    told = {"inputs": "other inputs", "tokenizer": "another tokenizer"}
    told |= {"options": "other flags", "pieces": "other pieces"}
    differing = [what for name, what in told.items() if earlier.get(name) != manifest[name]]
    if earlier.get("skip_bad_lines") and not manifest["skip_bad_lines"]:
        differing.append("--skip-bad-lines")
    if differing:
        rule = f"{folder} holds the unfinished work of a run with {differing[0]}"
        raise ConfigError(OUTPUT, str(folder), rule, f"rm -r {folder}, or another prefix")


# ---- pieces --------------------------------------------------------------------------------------


def _run_pieces(request: Request, pieces: Sequence[Piece], watch: Watcher) -> None:
    """Has every piece done that is not."""
    folder = request.partial
    todo = [
        (number, piece)
        for number, piece in enumerate(pieces)
        if not receipt_path(folder, number).exists()
    ]
    total, left = sum(p.weight for p in pieces), sum(p.weight for _, p in todo)
    kept = len(pieces) - len(todo)
    watch(Start(weight=total, kept_weight=total - left, pieces=len(pieces), kept_pieces=kept))
    job = Job(
        folder=folder,
        tokenizer_type=request.tokenizer_type,
        tokenizer_model=request.tokenizer_model,
        keys=request.keys,
        append_eod=request.append_eod,
        skip_bad_lines=request.skip_bad_lines,
    )
    workers = min(request.workers or cores(), len(todo))
    team: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            connection, process = _begin(job)
            team[connection] = process
        _deal(team, todo, watch)
    finally:
        for connection in team:
            connection.close()
        for process in team.values():
            process.join(SECONDS_TO_END if not todo else 0)
            process.terminate()
            process.join()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin(job: Job) -> tuple[Connection, SpawnProcess]:
    # Spawned: a process that is forked from one with threads may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _deal(
    team: Mapping[Connection, SpawnProcess], todo: list[tuple[int, Piece]], watch: Watcher
) -> None:
    """Gives each process a piece as soon as it has none; takes the pieces out of ``todo``."""
    todo.reverse()
    busy: set[Connection] = set()
    for connection, process in team.items():
        _give(connection, process, todo.pop())
        busy.add(connection)
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            try:
                answer = ready.recv()
            except (EOFError, ConnectionResetError):
                raise _died(team[ready]) from None
            if isinstance(answer, Failed):
                if answer.error is not None:
                    raise answer.error
                raise RuntimeError(f"a process failed:\n{answer.trace}")
            if isinstance(answer, Step):
                watch(answer)
                continue
            assert isinstance(answer, Finished)
            if todo:
                _give(ready, team[ready], todo.pop())
            else:
                busy.remove(ready)


def _give(connection: Connection, process: SpawnProcess, task: tuple[int, Piece]) -> None:
    try:
        connection.send(task)
    except (BrokenPipeError, ConnectionResetError):
        raise _died(process) from None


def _died(process: SpawnProcess) -> ConfigError:
    process.join(SECONDS_TO_END)
    rule = f"a process ended with code {process.exitcode}, perhaps for want of memory"
    works = "fewer --workers; what is finished is kept, the same command goes on"
    return ConfigError("--workers", "", rule, works)


# ---- the result ----------------------------------------------------------------------------------


def _join(request: Request, pieces: Sequence[Piece], vocab_size: int) -> Result:
    """Lays the pieces one after the other."""
    folder = request.partial
    receipts = [json.loads(receipt_path(folder, n).read_bytes()) for n in range(len(pieces))]
    tokens = [sum(each["tokens"][key] for each in receipts) for key in range(len(request.keys))]
    for name, count in zip(request.keys, tokens):
        if count == 0:
            rule = f"no document has any text under the key {name!r}"
            raise ConfigError(FLAG, " ".join(request.inputs), rule, "documents with text")
    try:
        for key, prefix in enumerate(request.outputs):
            with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
                for number, receipt in enumerate(receipts):
                    path = ids_path(folder, number, key)
                    lengths = _checked_lengths(folder, number, key, receipt)
                    writer.add_file(path, lengths)
                writer.finalize()
    except OSError as error:
        rule = f"can not be written: {error.strerror}"
        raise ConfigError(OUTPUT, request.output_prefix, rule, "a disk with room") from None
    counts = [sum(each["documents"][key] for each in receipts) for key in range(len(request.keys))]
    return Result(
        outputs=request.outputs,
        documents=tuple(counts),
        tokens=tuple(tokens),
        skipped=tuple(_skipped(pieces, receipts)),
    )


def _checked_lengths(folder: Path, number: int, key: int, receipt: Mapping[str, Any]) -> Any:
    """Lengths of a piece's documents, after a look whether its files are what they were.

    A machine that lost power may have the names of files and not what was in them.
    """
    lengths = np.fromfile(lengths_path(folder, number, key), dtype="<i4")
    check = 0
    with ids_path(folder, number, key).open("rb") as stream:
        while data := stream.read(SMALLEST_PIECE):
            check = zlib.crc32(data, check)
    good = (check, len(lengths), int(lengths.sum(dtype=np.int64)))
    if good != tuple(receipt[name][key] for name in ("crc32", "documents", "tokens")):
        receipt_path(folder, number).unlink()
        rule = f"the finished piece {number} in it is damaged and was thrown away"
        raise ConfigError(OUTPUT, str(folder), rule, "the same command, which makes it again")
    return lengths


def _skipped(pieces: Sequence[Piece], receipts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was skipped, with line numbers of the whole file."""
    path, before = "", 0
    for piece, receipt in zip(pieces, receipts):
        if piece.paths[0] != path or piece.start == 0:
            path, before = piece.paths[0], 0
        for line, reason in receipt["skipped"]:
            yield f"{path}:{before + line}: {reason}" if line else reason
        before += receipt["lines"]
