"""The records of a file of conversations.

.jsonl .json .ndjson    an object per line, or one JSON array of objects
.parquet                a row each; what is null in a row is left out, because a table gives
                        every row the keys of all
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cp_megatron.data.read.json_lines import BadLineError, parse_object
from cp_megatron.data.read.tables import read_rows
from cp_megatron.data.read.text_files import FLAG, MOST_TOKENISED, check_size
from cp_megatron.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
WORKS = "a .jsonl, .json, .ndjson or .parquet file with a conversation in each line or row"
PROBE_RECORDS, PROBE_BYTES = 8, 1 << 20
"""How much of a file is read before torch is loaded."""

_BATCH = 512
_BETWEEN = re.compile(r"[\s,]*")

Found = tuple[str, dict[str, Any] | BadLineError]
"""Where a record is, for messages, and the record or why it is none."""


def check_chat_path(path: str, flag: str) -> None:
    """Refuses a path that is no file of conversations.

    Raises:
        ConfigError: there is no such file, or it is of another kind.
    """
    if not Path(path).is_file():
        rule = "--sft reads conversations from a file" if Path(path).exists() else "no such file"
        raise ConfigError(flag, path, rule, WORKS)
    if not path.lower().endswith(SUFFIXES):
        rule = "--sft reads conversations, and this is a file of another kind"
        raise ConfigError(flag, path, rule, WORKS)


def read_records(path: str, *, probe: bool) -> Iterator[Found]:
    """Yields the records of a file, in order; blank lines are left out.

    Args:
        path: a file that ``check_chat_path`` lets pass.
        probe: only the first few.

    Raises:
        ConfigError: the file cannot be read or is not UTF-8, or has more than 128 MiB.
    """
    try:
        table = path.lower().endswith(".parquet")
        found = _rows(path, probe) if table else _objects(path, probe)
        yield from islice(found, PROBE_RECORDS) if probe else found
    except OSError as error:
        raise ConfigError(FLAG, path, f"cannot be read: {error.strerror}", WORKS) from None
    except UnicodeDecodeError as error:
        raise ConfigError(FLAG, path, f"is not UTF-8 at byte {error.start + 1}", WORKS) from None


def _rows(path: str, probe: bool) -> Iterator[Found]:
    if not probe:
        check_size(path, Path(path).stat().st_size, MOST_TOKENISED)
    try:
        for number, row in enumerate(read_rows(path, PROBE_RECORDS if probe else _BATCH), 1):
            yield f"row {number}", _without_null(row)
    except ConfigError as error:  # its flag is that of prepare_data.py
        raise ConfigError(FLAG, path, error.rule, error.works) from None


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _objects(path: str, probe: bool) -> Iterator[Found]:
    with Path(path).open("rb") as stream:
        if not probe:
            check_size(path, stream.seek(0, 2), MOST_TOKENISED)
            stream.seek(0)
        data = stream.read(PROBE_BYTES if probe else -1)
        whole = not stream.read(1)
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _elements(data, whole)
        return
    lines = data.split(b"\n")
    if not whole and len(lines) > 1:
        lines.pop()  # it is cut
    for number, line in enumerate(lines, 1):
        try:
            if (value := parse_object(line)) is not None:
                yield f"line {number}", value
        except BadLineError as error:
            if number == 1 and whole and isinstance(single := _parsed(data), dict):
                yield "its object", single
                return
            if not whole and line.strip() == b"{":  # the beginning of such an object
                return
            if whole or number < len(lines):
                yield f"line {number}", error


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _elements(data: bytes, whole: bool) -> Iterator[Found]:
    """The elements of a JSON array, one by one, so that its beginning can be read alone."""
    text = data.decode("utf-8-sig", errors="strict" if whole else "ignore")
    decoder, number = json.JSONDecoder(), 0
    place = text.index("[") + 1
    while True:
        place = _end(_BETWEEN, text, place)
        if text[place : place + 1] in ("]", ""):
            if whole and text[place:].rstrip() != "]":
                rule = "the array has no end, or something follows it"
                yield f"element {number}", BadLineError(f"not JSON: {rule}")
            return
        number += 1
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            if whole:
                yield f"element {number}", BadLineError(f"not JSON: {error}")
            return
        good = isinstance(value, dict)
        yield f"element {number}", value if good else BadLineError("not a JSON object")


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place
