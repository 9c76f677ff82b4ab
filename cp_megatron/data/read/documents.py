"""Finds and reads documents: text, JSON, tables, folders of data; also packed.

The inputs are cut, in order, into spans that processes read independently:

    a text file                  one document; small files share a span
    a JSON object per line       one document per line and key; a span is a range of bytes:

        {"text": "a"}\\n{"text": "b"}\\n{"text": "c"}\\n
        |------ span 0 -------|------ span 1 ------|     a line belongs to the span it begins in

    a table of text, a JSON      one document per row or object, and key; the file is one span, as
    array, anything packed       is every packed file
    Parquet, Arrow, a folder     one document per row and column; a span is a row group, or a run
    ``save_to_disk`` wrote       of record batches
    any other folder             the files of it that hold data; if there are none, its text files
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from cp_megatron.data.read.compression import open_unpacked
from cp_megatron.data.read.file_kinds import (
    HEAD_BYTES,
    FileKind,
    Format,
    binary_kind,
    in_folder,
    kind_of,
)
from cp_megatron.data.read.json_lines import BadLineError, NoSuchKeyError, text_under
from cp_megatron.data.read.records import Record, lines_before, lines_of, objects_of, rows_of
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

_WORKS = "text files, .jsonl, .json, .csv, .tsv, .parquet, .arrow, or folders that hold some"
_UNITS: Mapping[str, str] = {"lines": "line", "objects": "object"}
BATCH_BYTES = 1 << 20
"""Text that is tokenised in one call."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """An input file.

    Attributes:
        kind: what it holds.
        size: bytes.
        mtime: when it was changed, in nanoseconds.
        explicit: the user named the file itself, so it may not be skipped.
    """

    kind: FileKind
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
        start, stop: a range of bytes, of row groups, or of record batches. ``stop`` is None if all
            of the file is read.
        weight: bytes of input, for the progress.
        explicit: see ``InputFile``.
    """

    format: Format
    paths: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    weight: int
    explicit: bool = True


@dataclass(frozen=True, kw_only=True)
class DocumentBatch:
    """Some documents of a span.

    Attributes:
        texts: for each key, the documents.
        weight: bytes of input read for them.
        places: of JSON and tables of text, the line, object or row of the span, from 1, of each
            document of the first key.
        lines: lines, objects or rows that were read.
        skipped: (line of the span from 1, reason), or for a text file (0, path and reason).
    """

    texts: tuple[list[str], ...]
    weight: int
    places: tuple[int, ...] = ()
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
            files.append(_input(kind_of(path, FLAG), path, explicit=True))
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
        if file.kind.format != "text":
            yield from _cut(file, span_bytes)
            continue
        small.append(file)
        weight = sum(each.size for each in small)
        shape = ("text", file.explicit)
        same = following is not None and (following.kind.format, following.explicit) == shape
        if not same or weight >= span_bytes:
            paths = tuple(each.path for each in small)
            yield InputSpan(format="text", paths=paths, weight=weight, explicit=file.explicit)
            small = []


def _cut(file: InputFile, span_bytes: int) -> Iterator[InputSpan]:
    span = InputSpan(format=file.kind.format, paths=(file.path,), weight=file.size)
    ranges: list[tuple[int, int, int]] = []
    if span.format == "parquet":
        ranges = [(number, number + 1, size) for number, size in row_groups(file.path)]
    elif span.format == "arrow":
        ranges = arrow_runs(file.path, span_bytes)
    elif span.format == "lines" and file.kind.packed is None:
        cuts = [*range(0, file.size, span_bytes), file.size]
        ranges = [(start, end, end - start) for start, end in pairwise(cuts)]
    else:
        yield span
    for start, stop, size in ranges:
        yield replace(span, start=start, stop=stop, weight=size)


def _input(kind: FileKind, path: str, *, explicit: bool) -> InputFile:
    state = os.stat(path)
    size, mtime = state.st_size, state.st_mtime_ns
    return InputFile(kind=kind, path=path, size=size, mtime=mtime, explicit=explicit)


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


def left_out(inputs: Sequence[str]) -> list[str]:
    """A note for each folder that holds files beside those that are read."""
    notes = []
    for folder in (path for given in inputs for path in _expanded(given) if os.path.isdir(path)):
        if not any((Path(folder) / name).is_file() for name in (SAVED_DATASET, SAVED_DATASETS)):
            others = in_folder(list(walk_files(folder))).left_out
            shown = ", ".join(os.path.basename(path) for path in others[:3])
            more = ", ..." if len(others) > 3 else ""
            notes += [f"{folder}: {len(others):,} files are not read: {shown}{more}"] * bool(others)
    return notes


def _in_folder(folder: Path) -> list[tuple[FileKind, str]]:
    """The files to read in a folder."""
    if (folder / SAVED_DATASET).is_file():
        return [(FileKind(format="arrow"), path) for path in _saved_files(folder)]
    if (folder / SAVED_DATASETS).is_file():
        splits = sorted(path.parent for path in folder.glob(f"*/{SAVED_DATASET}"))
        if len(splits) != 1:
            works = ", ".join(map(str, splits)) or _WORKS
            rule = f"holds {len(splits)} splits of a dataset, and only one can be read"
            raise ConfigError(FLAG, str(folder), rule, works)
        return _in_folder(splits[0])
    listed = in_folder(list(walk_files(folder)))
    if not listed.data:
        return [(FileKind(format="text"), path) for path in listed.chosen]
    return [(kind_of(path, FLAG), path) for path in listed.chosen]


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
    if span.format == "text":
        yield from _read_texts(span, len(keys))
    elif span.format in ("parquet", "arrow"):
        read = read_row_group if span.format == "parquet" else read_arrow
        for columns, share in read(span.paths[0], span.start, span.stop or 0, keys):
            texts = tuple([text for text in column if text] for column in columns)
            yield DocumentBatch(texts=texts, weight=round(span.weight * share))
    else:
        with open_unpacked(span.paths[0], FLAG) as stream:
            if span.format == "lines":
                records = lines_of(stream, span.start, span.stop)
            elif span.format == "objects":
                records = objects_of(stream, span.paths[0], FLAG)
            else:
                mark = "," if span.format == "csv" else "\t"
                records = rows_of(stream, keys, span.paths[0], FLAG, delimiter=mark)
            yield from _read_records(span, records, keys, skip_bad_lines)


def _read_texts(span: InputSpan, num_keys: int) -> Iterator[DocumentBatch]:
    texts: list[str] = []
    weight = 0
    for path in span.paths:
        with open_unpacked(path, FLAG) as stream:
            data = stream.read()
        text, reason = _decoded(path, data)
        if reason and span.explicit:
            raise ConfigError(FLAG, path, f"the file {reason}", _WORKS)
        if reason:
            skipped = (0, f"{path}: {reason}")
            yield DocumentBatch(texts=([],) * num_keys, weight=len(data), skipped=(skipped,))
            continue
        weight += len(data)
        if text:
            texts.append(text)
        if weight >= BATCH_BYTES:
            yield DocumentBatch(texts=(texts,), weight=weight)
            texts, weight = [], 0
    yield DocumentBatch(texts=(texts,), weight=weight)


def _decoded(path: str, data: bytes) -> tuple[str, str]:
    """The text of a file, and why it has none."""
    if (kind := binary_kind(path, data[:HEAD_BYTES])) is not None:
        return "", f"is {kind[0]}"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    return text, "is not UTF-8 text" if "\0" in text else ""


def _read_records(
    span: InputSpan, records: Iterator[Record], keys: Sequence[str], skip_bad_lines: bool
) -> Iterator[DocumentBatch]:
    columns: tuple[list[str], ...] = tuple([] for _ in keys)
    places: list[int] = []
    skipped: list[tuple[int, str]] = []
    weight = lines = 0

    def batch() -> DocumentBatch:
        return DocumentBatch(
            texts=columns,
            weight=weight,
            places=tuple(places),
            lines=lines,
            skipped=tuple(skipped),
        )

    for number, (size, value) in enumerate(records, 1):
        weight, lines = weight + size, lines + 1
        try:
            if isinstance(value, BadLineError):
                raise value
            texts = [] if value is None else [text_under(value, key) for key in keys]
            places += [number] * bool(texts and texts[0])
            for column, text in zip(columns, texts):
                column += [text] * bool(text)
        except BadLineError as error:
            if not skip_bad_lines:
                raise _bad_line(span, number, error) from None
            skipped.append((number, str(error)))
        if weight >= BATCH_BYTES:
            yield batch()
            columns, places, skipped, weight, lines = tuple([] for _ in keys), [], [], 0, 0
    yield batch()


def _bad_line(span: InputSpan, number: int, error: BadLineError) -> ConfigError:
    """The error for a line, with its number in the whole file."""
    path, what = span.paths[0], _UNITS.get(span.format, "row")
    works = "--skip-bad-lines, which lists what it skips"
    if isinstance(error, NoSuchKeyError) and number == 1 and not span.start:
        # The whole file is of another shape, so to skip its lines would leave nothing.
        works = error.works
    if span.start:
        number += lines_before(path, span.start)
    return ConfigError(FLAG, path, f"{what} {number}: {error}", works)
