"""Reads the JSON object of a line, and the text in it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

KEYS_FLAG = "--json-keys"
CHAT_KEYS = ("messages", "conversations", "conversation")
"""Keys of a record that has the turns of a conversation in a list."""


class BadLineError(ValueError):
    """A line does not hold what it should; the text of the error is the reason."""


class NoSuchKeyError(BadLineError):
    """An object lacks a key; ``works`` says what to do if all objects of the file do."""

    def __init__(self, key: str, value: Mapping[str, Any]) -> None:
        texts = [name for name, item in value.items() if isinstance(item, str)]
        self.works = instead_of_key(texts, value)
        super().__init__(f"has no key {key!r}, but {', '.join(map(repr, value)) or 'none at all'}")


def instead_of_key(texts: Sequence[str], keys: Collection[str]) -> str:
    """What works for a file that lacks the key of its texts.

    Args:
        texts: the keys that have a text.
        keys: all keys.
    """
    if texts:
        others = f" (or {', '.join(texts[1:])})" if texts[1:] else ""
        return f"{KEYS_FLAG} {texts[0]}{others}"
    if any(key in keys for key in CHAT_KEYS):
        return "pretrain.py --sft, which trains on conversations"
    return "a text under a key, or in a column"


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
