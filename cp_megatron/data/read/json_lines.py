"""Reads the JSON object of a line, and the text in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class BadLineError(ValueError):
    """A line does not hold what it should; the text of the error is the reason."""


class NoSuchKeyError(BadLineError):
    """An object lacks a key; ``keys`` are those under which it has a text."""

    def __init__(self, key: str, value: Mapping[str, Any]) -> None:
        self.keys = tuple(name for name, item in value.items() if isinstance(item, str))
        super().__init__(f"has no key {key!r}, but {', '.join(map(repr, value)) or 'none at all'}")


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
        raise NoSuchKeyError(key, value)
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
