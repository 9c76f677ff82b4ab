"""Reads files with a JSON object per line.

A bad line is refused with the name of the file and the number of the line, or counted if the user
asked for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cp_megatron.data.read.corpus import Corpus
from cp_megatron.data.read.text_files import FLAG, MOST_TOKENISED, check_size, tokenised
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

SUFFIXES = (".jsonl", ".json")
PROBE_LINES, PROBE_BYTES = 8, 1 << 20
"""How much of a file is read before torch is loaded."""
_KEYS = "--json-keys with the key of the text"
_WORKS = "correct or remove the line, or --skip-bad-lines to leave such lines out"

Item = TypeVar("Item")


class BadLineError(ValueError):
    """A line does not hold what it should; the text of the error is the reason."""


class NoKeyError(BadLineError):
    """A line has other keys, as most likely all lines of the file have."""


def read_lines(
    path: str, parse: Callable[[Any], Item], *, skip_bad: bool
) -> tuple[list[tuple[int, Item]], int]:
    """Reads a file line by line; blank lines are ignored.

    Args:
        path: the file.
        parse: makes an item of the object of a line, or raises ``BadLineError``.
        skip_bad: leave bad lines out instead of refusing them.

    Returns:
        (the number of the line, counted from 1, and what was parsed) for each line, and the number
        of bad lines that were left out.

    Raises:
        ConfigError: the file cannot be read, is larger than 128 MiB, or a line is bad.
    """
    items: list[tuple[int, Item]] = []
    bad = 0
    try:
        check_size(path, Path(path).stat().st_size, MOST_TOKENISED)
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(FLAG, path, f"cannot be read: {error.strerror}", _WORKS) from None
    for number, line in enumerate(lines, start=1):
        try:
            if (value := parse_object(line)) is not None:
                items.append((number, parse(value)))
        except BadLineError as error:
            bad += 1
            if not skip_bad:
                raise ConfigError(FLAG, path, f"line {number}: {error}", works_for(error)) from None
    return items, bad


def load_json_text(path: str, tokenizer: Tokenizer, *, key: str, skip_bad: bool) -> Corpus:
    """Reads the texts under a key of a file, one document each; empty ones are left out.

    Raises:
        ConfigError: as ``read_lines``, or there is no text.
    """
    lines, bad = read_lines(path, lambda value: text_under(value, key).encode(), skip_bad=skip_bad)
    kept = [(f"{Path(path).name}:{number}", text) for number, text in lines if text]
    if not kept:
        works = f'{{"{key}": "..."}} on each line, or another --json-keys'
        raise ConfigError(FLAG, path, f"holds no text under the key {key!r}", works)
    names, texts = zip(*kept)
    return tokenised(texts, tokenizer, names=names, name=path, skipped=bad)


def check_json_text(path: str, *, key: str, skip_bad: bool) -> None:
    """Reads the first lines of a file as ``load_json_text`` does.

    Raises:
        ConfigError: a line is bad and may not be left out, or no line has the key.
    """
    with Path(path).open("rb") as stream:
        lines = stream.read(PROBE_BYTES).split(b"\n")
        whole = not stream.read(1)
    if not whole:
        lines.pop()  # it is cut
    missing = 0
    for number, line in enumerate(lines[:PROBE_LINES], start=1):
        try:
            if (value := parse_object(line)) is not None:
                text_under(value, key)
        except BadLineError as error:
            missing += isinstance(error, NoKeyError)
            if not skip_bad or missing == PROBE_LINES:
                raise ConfigError(FLAG, path, f"line {number}: {error}", works_for(error)) from None


def works_for(error: BadLineError) -> str:
    """What a user can do about a bad line."""
    return _KEYS if isinstance(error, NoKeyError) else _WORKS


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Parses the JSON object of a line in UTF-8; None if the line is blank.

    Raises:
        BadLineError: the line holds something else.
    """
    try:
        text = line.decode("utf-8").removeprefix("\ufeff").strip()
        value: Any = json.loads(text) if text else {}
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadLineError("not a JSON object")
    return value if text else None


def text_under(value: Mapping[str, Any], key: str) -> str:
    """Returns the text that an object has under a key.

    Raises:
        BadLineError: there is none.
    """
    if key not in value:
        raise NoKeyError(f"has no key {key!r}, only {', '.join(value) or 'none'}")
    text = value[key]
    if not isinstance(text, str):
        raise BadLineError(f"{key!r} is not a text")
    check_surrogates(text, repr(key))
    return text


def check_surrogates(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell and UTF-8 cannot.

    Raises:
        BadLineError: the text has such a half; the message says ``where``.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLineError(f"{where} has half of a surrogate pair") from None
