"""The records of a file: JSON objects, or rows of a table of text.

Each comes with the number of bytes that were read for it, for the progress. What is not a record
gives an error in its place, which the caller raises or skips.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from cp_megatron.data.read.json_lines import KEYS_FLAG, BadLineError, instead_of_key, parse_object
from cp_megatron.errors import ConfigError

Record = tuple[int, dict[str, Any] | BadLineError | None]
"""The bytes that were read, and the record; None for a blank line."""
_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")
_LONGEST_CELL = (1 << 31) - 1
_LONGEST_OBJECT = 1 << 28
"""A file is damaged if this many characters of it are not one whole object."""


def lines_of(stream: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    """The objects of the lines that begin in the bytes [start, stop) of a stream."""
    place = start
    if place:
        # Starts at the byte before: if that byte ends a line, a line begins with the span.
        stream.seek(place - 1)
        place += len(stream.readline()) - 1
    while (stop is None or place < stop) and (line := stream.readline()):
        place += len(line)
        try:
            yield len(line), parse_object(line)
        except BadLineError as error:
            yield len(line), error


def objects_of(stream: BinaryIO, path: str, flag: str) -> Iterator[Record]:
    """The elements of one JSON array, or objects that follow one another.

    Args:
        stream: the content of the file.
        path, flag: the file and the flag that named it, for messages.

    Raises:
        ConfigError: from some place on, the content is not JSON.
    """
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    text, place, number = "", 0, 0
    in_array, ended = False, False
    while True:
        match = _BETWEEN.match(text, place)
        place = match.end() if match else place
        rule = ""
        try:
            if text[place : place + 1] in ("[", "]") and (text[place] == "]") == in_array:
                ended, in_array, place = in_array, not in_array, place + 1
                continue
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            rule = error.msg
        except (ValueError, RecursionError) as error:
            raise _not_json(flag, path, number + 1, error) from None
        if rule:
            # Read as much again as is left, so that a long object is not decoded too often.
            left = len(text) - place
            more = _read(reader, max(_CHUNK, left), path, flag) if left < _LONGEST_OBJECT else ""
            if not more:
                break
            text, place = text[place:] + more, 0
            continue
        number += 1
        good = isinstance(value, dict) and not ended
        yield end - place, value if good else BadLineError("not a JSON object")
        place = end
    if in_array or text[place:].strip():
        reason = rule if text[place:].strip() else "the array has no end"
        raise _not_json(flag, path, number + 1, reason)


def _not_json(flag: str, path: str, number: int, reason: object) -> ConfigError:
    works = "a JSON object on each line, or one array of objects"
    return ConfigError(flag, path, f"object {number}: not JSON: {reason}", works)


def _read(reader: io.TextIOWrapper, size: int, path: str, flag: str) -> str:
    try:
        return reader.read(size)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, flag, error) from None


def _not_utf8(path: str, flag: str, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(flag, path, f"is not UTF-8: {error.reason}", "iconv -t UTF-8 FILE")


def rows_of(
    stream: BinaryIO, keys: Sequence[str], path: str, flag: str, *, delimiter: str
) -> Iterator[Record]:
    """The rows of a table of text, whose first row names the columns.

    Args:
        stream: the content of the file.
        keys: the columns to read.
        path, flag: the file and the flag that named it, for messages.
        delimiter: what stands between two cells.

    Raises:
        ConfigError: there is no such column, or from some place on the content is no table.
    """
    csv.field_size_limit(_LONGEST_CELL)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            size = sum(map(len, cells)) + len(cells)
            if names is None:
                names = cells
                for key in keys:
                    if key not in names:
                        works = instead_of_key(names, names)
                        raise ConfigError(KEYS_FLAG, key, f"is no column of {path}", works)
            elif len(cells) == len(names):
                yield size, dict(zip(names, cells))
            elif cells:
                rule = f"a row of {len(cells)} cells, where the first row names {len(names)}"
                yield size, BadLineError(rule)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, flag, error) from None
    except csv.Error as error:
        rule = f"line {reader.line_num}: is not a row of the table: {error}"
        raise ConfigError(
            flag, path, rule, "cells that are quoted at both ends or not at all"
        ) from None


def lines_before(path: str, place: int) -> int:
    """Counts the lines of a file that begin before the byte ``place``."""
    newlines, last, left = 0, b"", place
    with open(path, "rb") as stream:
        while left and (data := stream.read(min(left, _CHUNK))):
            newlines += data.count(b"\n")
            last, left = data[-1:], left - len(data)
    return newlines + (last not in (b"", b"\n"))
