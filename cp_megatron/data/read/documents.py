"""Where ``prepare_data`` finds documents: text, JSON lines, Parquet, folders of data. No torch.

The inputs become pieces, in order, that processes read on their own:

    a text file                  one document; small files share a piece
    .jsonl .json (.gz)           one document per line and key; a piece is a range of bytes:

        {"text": "a"}\\n{"text": "b"}\\n{"text": "c"}\\n
        |------ piece 0 ------|------ piece 1 -----|     a line belongs to where it begins

    .parquet, a folder that      one document per row and column; a piece is a row group, or a run
    ``save_to_disk`` wrote       of record batches
    any other folder             the .jsonl, .jsonl.gz, .json.gz and .parquet files in it; where
                                 there are none, its text files
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from cp_megatron.data.read.json_lines import BadLineError, parse_object, text_under
from cp_megatron.data.read.tables import (
    SAVED_DATASET,
    SAVED_DATASETS,
    Rows,
    arrow_runs,
    read_arrow,
    read_row_group,
    row_groups,
)
from cp_megatron.errors import ConfigError

FLAG = "--input"
WORKS = "text files, .jsonl, .json, .parquet (also .jsonl.gz), or folders that hold some"
BUNDLE_BYTES = 1 << 20
"""Text that is tokenised in one call."""
_LINES, _ZIPPED = (".jsonl", ".json"), (".jsonl.gz", ".json.gz")
_DATA = (".jsonl", *_ZIPPED, ".parquet")

Format = Literal["text", "lines", "zipped", "parquet", "arrow"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one process reads in one go.

    Attributes:
        format: how.
        paths: the file; several only for text.
        start, stop: bytes, the row group, or record batches.
        weight: bytes of input, for the progress.
        explicit: the user named the file itself, so it may not be skipped.
    """

    format: Format
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    weight: int
    explicit: bool = True


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Some documents of a piece, or what was skipped.

    Attributes:
        texts: for each key, the documents.
        weight: bytes of input read for them.
        lines: lines that were read.
        skipped: (line of the piece from 1, reason), or for a text file (0, path and reason).
    """

    texts: tuple[list[str], ...]
    weight: int
    lines: int = 0
    skipped: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file: what it is called, its size in bytes, when it was changed (ns)."""

    path: str
    size: int
    mtime: int


# ---- finding -------------------------------------------------------------------------------------


def find_sources(inputs: Sequence[str]) -> list[tuple[Format, Source, bool]]:
    """Every input file in order: its format, itself, whether the user named the file itself.

    Raises:
        ConfigError: an input is missing or holds nothing to read.
    """
    found: list[tuple[Format, Source, bool]] = []
    for given in inputs:
        for path in _expanded(given):
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                inner = [(kind, _source(file), False) for kind, file in _in_folder(Path(path))]
                if not inner:
                    raise ConfigError(FLAG, path, "the folder holds nothing to read", WORKS)
                found += inner
            elif stat.S_ISREG(mode):
                found.append((_format_of(path), _source(path), True))
            else:
                raise ConfigError(FLAG, path, "must be a regular file or a folder", WORKS)
    return found


def cut_pieces(
    sources: Sequence[tuple[Format, Source, bool]], *, piece_bytes: int
) -> Iterator[Piece]:
    """Cuts the inputs into pieces of about ``piece_bytes``; the documents and their order do not
    depend on it.

    Raises:
        ConfigError: a table can not be read.
    """
    small: list[Source] = []
    for place, (kind, source, explicit) in enumerate(sources):
        if kind == "text":
            small.append(source)
            following = sources[place + 1] if place + 1 < len(sources) else None
            mixed = following is None or (following[0], following[2]) != (kind, explicit)
            if mixed or sum(each.size for each in small) >= piece_bytes:
                weight = sum(each.size for each in small)
                paths = tuple(each.path for each in small)
                yield Piece(format="text", paths=paths, weight=weight, explicit=explicit)
                small = []
        else:
            yield from _cut(kind, source, explicit, piece_bytes)


def _cut(kind: Format, source: Source, explicit: bool, piece_bytes: int) -> Iterator[Piece]:
    ranges: list[tuple[int, int, int]] = [(0, 0, source.size)]
    if kind == "lines":
        starts = range(0, source.size, piece_bytes)
        ends = [min(start + piece_bytes, source.size) for start in starts]
        ranges = [(start, end, end - start) for start, end in zip(starts, ends)]
    elif kind == "parquet":
        ranges = [(number, number + 1, size) for number, size in row_groups(source.path)]
    elif kind == "arrow":
        ranges = arrow_runs(source.path, piece_bytes)
    for start, stop, weight in ranges:
        yield Piece(
            format=kind,
            paths=(source.path,),
            start=start,
            stop=stop,
            weight=weight,
            explicit=explicit,
        )


def _expanded(given: str) -> list[str]:
    """The paths that an input stands for, which may have * and ? in it."""
    if _exists(given):
        return [given]
    # A link that points nowhere matches too.
    found = sorted(filter(_exists, glob.glob(given, recursive=True)))
    if not found:
        rule = "matches no file" if glob.has_magic(given) else "there is no such file or folder"
        raise ConfigError(FLAG, given, rule, WORKS)
    return found


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def _format_of(path: str) -> Format:
    name = path.lower()
    if name.endswith(_ZIPPED):
        return "zipped"
    if name.endswith(_LINES):
        return "lines"
    return "parquet" if name.endswith(".parquet") else "text"


def _in_folder(folder: Path) -> list[tuple[Format, str]]:
    """The files of a folder to read, by name, a folder's files before its folders."""
    if (folder / SAVED_DATASET).is_file():
        return [("arrow", path) for path in _saved_files(folder)]
    if (folder / SAVED_DATASETS).is_file():
        splits = sorted(path.parent for path in folder.glob(f"*/{SAVED_DATASET}"))
        if len(splits) != 1:
            works = ", ".join(map(str, splits)) or WORKS
            rule = f"holds {len(splits)} splits of a dataset, one can be read"
            raise ConfigError(FLAG, str(folder), rule, works)
        return _in_folder(splits[0])
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [os.path.join(place, name) for name in sorted(names) if not name.startswith(".")]
        files += [path for path in paths if os.path.isfile(path)]
    data = [path for path in files if path.lower().endswith(_DATA)]
    return [(_format_of(path), path) for path in data] or [("text", path) for path in files]


def _saved_files(folder: Path) -> list[str]:
    """The files of a dataset in the order in which ``save_to_disk`` wrote it."""
    try:
        state = json.loads((folder / SAVED_DATASET).read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        selected = state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError):
        rule = f"its {SAVED_DATASET} does not name the files of a dataset"
        raise ConfigError(FLAG, str(folder), rule, WORKS) from None
    if selected:  # early versions of the library wrote all rows, and which of them count
        rule = f"its {SAVED_DATASET} selects some of the rows that it holds"
        works = "the folder that dataset.flatten_indices().save_to_disk writes"
        raise ConfigError(FLAG, str(folder), rule, works)
    for name in names:
        if not (folder / name).is_file():
            rule = f"its {SAVED_DATASET} names {name}, which is missing"
            raise ConfigError(FLAG, str(folder), rule, "the whole dataset")
    return [str(folder / name) for name in names]


def _source(path: str) -> Source:
    state = os.stat(path)
    return Source(path=path, size=state.st_size, mtime=state.st_mtime_ns)


# ---- reading -------------------------------------------------------------------------------------


def read_piece(piece: Piece, keys: Sequence[str], *, skip_bad_lines: bool) -> Iterator[Bundle]:
    """The documents of a piece, in order.

    Args:
        piece: what to read.
        keys: keys of the JSON objects or columns of the tables; text has one only.
        skip_bad_lines: a malformed line is skipped and told of, not refused.

    Raises:
        ConfigError: a file, or a line that may not be skipped, can not be read.
    """
    try:
        if piece.format == "text":
            yield from _read_texts(piece, len(keys))
        elif piece.format in ("lines", "zipped"):
            yield from _read_lines(piece, keys, skip_bad_lines)
        else:
            read = read_row_group if piece.format == "parquet" else read_arrow
            for rows in read(piece.paths[0], piece.start, piece.stop, keys):
                yield _bundle_of_rows(rows, piece.weight)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        rule = f"can not be read: {reason}"
        raise ConfigError(FLAG, piece.paths[0], rule, "a file that can be read") from None


def _bundle_of_rows(rows: Rows, weight: int) -> Bundle:
    texts = tuple([text for text in column if text] for column in rows.columns)
    return Bundle(texts=texts, weight=round(weight * rows.share))


def _read_texts(piece: Piece, num_keys: int) -> Iterator[Bundle]:
    texts: list[str] = []
    weight = 0
    for path in piece.paths:
        data = Path(path).read_bytes()
        try:
            text = data.decode("utf-8")
            good = "\0" not in text
        except UnicodeDecodeError:
            good = False
        if not good and piece.explicit:
            raise ConfigError(FLAG, path, "the file is not UTF-8 text", WORKS)
        if not good:
            reason = (0, f"{path}: not UTF-8 text")
            yield Bundle(texts=([],) * num_keys, weight=len(data), skipped=(reason,))
            continue
        weight += len(data)
        if text:
            texts.append(text)
        if weight >= BUNDLE_BYTES:
            yield Bundle(texts=(texts,), weight=weight)
            texts, weight = [], 0
    yield Bundle(texts=(texts,), weight=weight)


def _read_lines(piece: Piece, keys: Sequence[str], skip_bad_lines: bool) -> Iterator[Bundle]:
    columns: tuple[list[str], ...] = tuple([] for _ in keys)
    skipped: list[tuple[int, str]] = []
    weight = lines = 0
    number = 0
    for number, line in enumerate(_lines_of(piece), 1):
        weight, lines = weight + len(line), lines + 1
        try:
            for column, text in zip(columns, parse_line(line, keys)):
                if text:
                    column.append(text)
        except BadLineError as error:
            if not skip_bad_lines:
                raise _bad_line(piece, number, str(error)) from None
            skipped.append((number, str(error)))
        if weight >= BUNDLE_BYTES:
            yield Bundle(texts=columns, weight=weight, lines=lines, skipped=tuple(skipped))
            columns, skipped, weight, lines = tuple([] for _ in keys), [], 0, 0
    yield Bundle(texts=columns, weight=weight, lines=lines, skipped=tuple(skipped))


def _lines_of(piece: Piece) -> Iterator[bytes]:
    """The lines that begin in the piece, as bytes."""
    path = piece.paths[0]
    if piece.format == "zipped":
        with gzip.open(path, "rb") as stream:
            yield from cast(BinaryIO, stream)
        return
    with open(path, "rb") as stream:
        place = piece.start
        if place:
            # From the byte before: where it ends a line, the piece begins with a whole one.
            stream.seek(place - 1)
            place += len(stream.readline()) - 1
        while place < piece.stop and (line := stream.readline()):
            place += len(line)
            yield line


def parse_line(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """The texts of a line under ``keys``; a blank line has empty texts.

    Raises:
        BadLineError: it has none.
    """
    found = parse_object(line)
    return tuple("" if found is None else text_under(found, key) for key in keys)


def _bad_line(piece: Piece, number: int, reason: str) -> ConfigError:
    """The refusal of a line, with its number in the whole file."""
    path = piece.paths[0]
    if piece.start:
        number += lines_before(path, piece.start)
    rule = f"line {number}: {reason}"
    return ConfigError(FLAG, path, rule, "--skip-bad-lines, which lists what it skips")


def lines_before(path: str, place: int) -> int:
    """Lines of a file that begin before a byte."""
    newlines, last, left = 0, b"", place
    with open(path, "rb") as stream:
        while left and (data := stream.read(min(left, BUNDLE_BYTES))):
            newlines += data.count(b"\n")
            last, left = data[-1:], left - len(data)
    return newlines + (last not in (b"", b"\n"))
