"""Finds and reads the documents of ``prepare_data``: text, JSON lines, Parquet, folders of data.

The inputs are cut, in order, into spans that processes read independently:

    a text file                  one document; small files share a span
    .jsonl .json (.gz)           one document per line and key; a span is a range of bytes:

        {"text": "a"}\\n{"text": "b"}\\n{"text": "c"}\\n
        |------ span 0 -------|------ span 1 ------|     a line belongs to the span it begins in

    .parquet, a folder that      one document per row and column; a span is a row group, or a run
    ``save_to_disk`` wrote       of record batches
    any other folder             the .jsonl, .jsonl.gz, .json.gz and .parquet files in it; if there
                                 are none, its text files
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, cast

from cp_megatron.data.read.json_lines import BadLineError, parse_object, text_under
from cp_megatron.data.read.tables import (
    FLAG,
    SAVED_DATASET,
    SAVED_DATASETS,
    arrow_runs,
    read_arrow,
    read_row_group,
    row_groups,
)
from cp_megatron.data.read.text_files import walk_files
from cp_megatron.errors import ConfigError

_WORKS = "text files, .jsonl, .json, .parquet (also .jsonl.gz), or folders that hold some"
BATCH_BYTES = 1 << 20
"""Text that is tokenised in one call."""
_DATA = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")

Format = Literal["text", "lines", "zipped", "parquet", "arrow"]


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """An input file.

    Attributes:
        format: how it is read.
        size: bytes.
        mtime: when it was changed, in nanoseconds.
        explicit: the user named the file itself, so it may not be skipped.
    """

    format: Format
    path: str
    size: int
    mtime: int
    explicit: bool


@dataclass(frozen=True, kw_only=True)
class InputSpan:
    """The part of the inputs that one process reads at a time.

    Attributes:
        format: how it is read.
        paths: the file; several only for text.
        start, stop: a range of bytes, of row groups, or of record batches.
        weight: bytes of input, for the progress.
        explicit: see ``InputFile``.
    """

    format: Format
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    weight: int
    explicit: bool = True


@dataclass(frozen=True, kw_only=True)
class DocumentBatch:
    """Some documents of a span.

    Attributes:
        texts: for each key, the documents.
        weight: bytes of input read for them.
        lines: lines that were read.
        skipped: (line of the span from 1, reason), or for a text file (0, path and reason).
    """

    texts: tuple[list[str], ...]
    weight: int
    lines: int = 0
    skipped: tuple[tuple[int, str], ...] = ()


# ---- finding -------------------------------------------------------------------------------------


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """Returns every input file, in order.

    Args:
        inputs: files, folders, and patterns with * and ?.

    Raises:
        ConfigError: an input is missing or holds nothing to read.
    """
    files: list[InputFile] = []
    for path in (path for given in inputs for path in _expanded(given)):
        if os.path.isfile(path):
            files.append(_input(_format_of(path), path, explicit=True))
        elif not os.path.isdir(path):
            raise ConfigError(FLAG, path, "must be a regular file or a folder", _WORKS)
        elif inner := _in_folder(Path(path)):
            files += [_input(kind, file, explicit=False) for kind, file in inner]
        else:
            raise ConfigError(FLAG, path, "the folder holds nothing to read", _WORKS)
    return files


def cut_spans(files: Sequence[InputFile], *, span_bytes: int) -> Iterator[InputSpan]:
    """Cuts the inputs into spans of about ``span_bytes``.

    The documents and their order do not depend on ``span_bytes``.

    Raises:
        ConfigError: a table cannot be read.
    """
    small: list[InputFile] = []
    for file, following in zip(files, [*files[1:], None]):
        if file.format != "text":
            yield from _cut(file, span_bytes)
            continue
        small.append(file)
        weight = sum(each.size for each in small)
        shape = ("text", file.explicit)
        same = following is not None and (following.format, following.explicit) == shape
        if not same or weight >= span_bytes:
            paths = tuple(each.path for each in small)
            yield InputSpan(format="text", paths=paths, weight=weight, explicit=file.explicit)
            small = []


def _cut(file: InputFile, span_bytes: int) -> Iterator[InputSpan]:
    ranges: list[tuple[int, int, int]] = [(0, 0, file.size)]
    if file.format == "lines":
        cuts = [*range(0, file.size, span_bytes), file.size]
        ranges = [(start, end, end - start) for start, end in pairwise(cuts)]
    elif file.format == "parquet":
        ranges = [(number, number + 1, size) for number, size in row_groups(file.path)]
    elif file.format == "arrow":
        ranges = arrow_runs(file.path, span_bytes)
    for start, stop, size in ranges:
        yield InputSpan(format=file.format, paths=(file.path,), start=start, stop=stop, weight=size)


def _input(kind: Format, path: str, *, explicit: bool) -> InputFile:
    state = os.stat(path)
    size, mtime = state.st_size, state.st_mtime_ns
    return InputFile(format=kind, path=path, size=size, mtime=mtime, explicit=explicit)


def _expanded(given: str) -> list[str]:
    """The paths that an input stands for."""
    if os.path.exists(given):
        return [given]
    # glob also returns links that point nowhere.
    paths = sorted(filter(os.path.exists, glob.glob(given, recursive=True)))
    if not paths:
        rule = "matches no file" if glob.has_magic(given) else "there is no such file or folder"
        raise ConfigError(FLAG, given, rule, _WORKS)
    return paths


def _format_of(path: str) -> Format:
    name = path.lower()
    if name.endswith((".jsonl.gz", ".json.gz")):
        return "zipped"
    if name.endswith((".jsonl", ".json")):
        return "lines"
    return "parquet" if name.endswith(".parquet") else "text"


def _in_folder(folder: Path) -> list[tuple[Format, str]]:
    """The files to read in a folder."""
    if (folder / SAVED_DATASET).is_file():
        return [("arrow", path) for path in _saved_files(folder)]
    if (folder / SAVED_DATASETS).is_file():
        splits = sorted(path.parent for path in folder.glob(f"*/{SAVED_DATASET}"))
        if len(splits) != 1:
            works = ", ".join(map(str, splits)) or _WORKS
            rule = f"holds {len(splits)} splits of a dataset, and only one can be read"
            raise ConfigError(FLAG, str(folder), rule, works)
        return _in_folder(splits[0])
    files = list(walk_files(folder))
    data = [path for path in files if path.lower().endswith(_DATA)]
    return [(_format_of(path), path) for path in data] or [("text", path) for path in files]


def _saved_files(folder: Path) -> list[str]:
    """The files of a dataset in the order in which ``save_to_disk`` wrote them."""
    try:
        state = json.loads((folder / SAVED_DATASET).read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        selected = state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError):
        rule = f"its {SAVED_DATASET} does not name the files of a dataset"
        raise ConfigError(FLAG, str(folder), rule, _WORKS) from None
    if selected:  # early versions of the library wrote all rows and a selection of them
        rule = f"its {SAVED_DATASET} selects some of the rows that it holds"
        works = "the folder that dataset.flatten_indices().save_to_disk writes"
        raise ConfigError(FLAG, str(folder), rule, works)
    for name in names:
        if not (folder / name).is_file():
            rule = f"its {SAVED_DATASET} names {name}, which is missing"
            raise ConfigError(FLAG, str(folder), rule, "the complete dataset")
    return [str(folder / name) for name in names]


# ---- reading -------------------------------------------------------------------------------------


def read_span(
    span: InputSpan, keys: Sequence[str], *, skip_bad_lines: bool
) -> Iterator[DocumentBatch]:
    """Yields the documents of a span, in order.

    Args:
        span: what to read.
        keys: keys of the JSON objects or columns of the tables; text has one only.
        skip_bad_lines: skip and report a malformed line instead of refusing it.

    Raises:
        ConfigError: a file, or a line that may not be skipped, cannot be read.
    """
    try:
        if span.format == "text":
            yield from _read_texts(span, len(keys))
        elif span.format in ("lines", "zipped"):
            yield from _read_lines(span, keys, skip_bad_lines)
        else:
            read = read_row_group if span.format == "parquet" else read_arrow
            for columns, share in read(span.paths[0], span.start, span.stop, keys):
                texts = tuple([text for text in column if text] for column in columns)
                yield DocumentBatch(texts=texts, weight=round(span.weight * share))
    except (OSError, EOFError, zlib.error) as error:
        rule = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(FLAG, span.paths[0], rule, "a readable file") from None


def _read_texts(span: InputSpan, num_keys: int) -> Iterator[DocumentBatch]:
    texts: list[str] = []
    weight = 0
    for path in span.paths:
        data = Path(path).read_bytes()
        try:
            text = data.decode("utf-8")
            good = "\0" not in text
        except UnicodeDecodeError:
            good = False
        if not good and span.explicit:
            raise ConfigError(FLAG, path, "the file is not UTF-8 text", _WORKS)
        if not good:
            reason = (0, f"{path}: not UTF-8 text")
            yield DocumentBatch(texts=([],) * num_keys, weight=len(data), skipped=(reason,))
            continue
        weight += len(data)
        if text:
            texts.append(text)
        if weight >= BATCH_BYTES:
            yield DocumentBatch(texts=(texts,), weight=weight)
            texts, weight = [], 0
    yield DocumentBatch(texts=(texts,), weight=weight)


def _read_lines(
    span: InputSpan, keys: Sequence[str], skip_bad_lines: bool
) -> Iterator[DocumentBatch]:
    columns: tuple[list[str], ...] = tuple([] for _ in keys)
    skipped: list[tuple[int, str]] = []
    weight = lines = 0
    for number, line in enumerate(_lines_of(span), 1):
        weight, lines = weight + len(line), lines + 1
        try:
            value = parse_object(line)
            texts = [] if value is None else [text_under(value, key) for key in keys]
            for column, text in zip(columns, texts):
                if text:
                    column.append(text)
        except BadLineError as error:
            if not skip_bad_lines:
                # The number in the whole file.
                number += lines_before(span.paths[0], span.start)
                works = "--skip-bad-lines, which lists what it skips"
                raise ConfigError(FLAG, span.paths[0], f"line {number}: {error}", works) from None
            skipped.append((number, str(error)))
        if weight >= BATCH_BYTES:
            yield DocumentBatch(texts=columns, weight=weight, lines=lines, skipped=tuple(skipped))
            columns, skipped, weight, lines = tuple([] for _ in keys), [], 0, 0
    yield DocumentBatch(texts=columns, weight=weight, lines=lines, skipped=tuple(skipped))


def _lines_of(span: InputSpan) -> Iterator[bytes]:
    """The lines that begin in the span, as bytes."""
    path = span.paths[0]
    if span.format == "zipped":
        with gzip.open(path, "rb") as stream:
            yield from cast(BinaryIO, stream)
        return
    with open(path, "rb") as stream:
        place = span.start
        if place:
            # Starts at the byte before: if that byte ends a line, a line begins with the span.
            stream.seek(place - 1)
            place += len(stream.readline()) - 1
        while place < span.stop and (line := stream.readline()):
            place += len(line)
            yield line


def lines_before(path: str, place: int) -> int:
    """Counts the lines of a file that begin before the byte ``place``."""
    newlines, last, left = 0, b"", place
    with open(path, "rb") as stream:
        while left and (data := stream.read(min(left, BATCH_BYTES))):
            newlines += data.count(b"\n")
            last, left = data[-1:], left - len(data)
    return newlines + (last not in (b"", b"\n"))
