"""Files with a JSON object per line. No torch.

A line that is none is refused with the file and the line's number, or counted where asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cp_megatron.data.read.sources import FLAG, MOST_TOKENISED, Corpus, check_size, corpus_of
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

SUFFIXES = (".jsonl", ".json")
WORKS = "a line mended or removed, or --skip-bad-lines to leave such lines out"

Item = TypeVar("Item")


class BadLineError(ValueError):
    """A line that does not hold what it should; its text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Lines(Generic[Item]):
    """What the lines of a file hold.

    Attributes:
        items: in the order of the lines.
        numbers: the line each comes from, counted from 1.
        bad: lines that were left out.
    """

    items: tuple[Item, ...]
    numbers: tuple[int, ...]
    bad: int


def read_lines(path: str, parse: Callable[[Any], Item], *, skip_bad: bool) -> Lines[Item]:
    """Reads a file line by line; blank lines hold nothing.

    Args:
        path: the file.
        parse: what is to be made of a line's object; raises ``BadLineError``.
        skip_bad: leave bad lines out instead of refusing them.

    Raises:
        ConfigError: the file can not be read, is larger than 128 MiB, or a line is bad.
    """
    items: list[Item] = []
    numbers: list[int] = []
    bad = 0
    try:
        check_size(path, Path(path).stat().st_size, MOST_TOKENISED)
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(FLAG, path, f"can not be read: {error.strerror}", WORKS) from None
    for number, line in enumerate(lines, start=1):
        try:
            if (found := parse_object(line)) is not None:
                items.append(parse(found))
                numbers.append(number)
        except BadLineError as error:
            bad += 1
            if not skip_bad:
                raise ConfigError(FLAG, path, f"line {number}: {error}", WORKS) from None
    return Lines(items=tuple(items), numbers=tuple(numbers), bad=bad)


def load_json_text(path: str, tokenizer: Tokenizer, *, skip_bad: bool) -> Corpus:
    """The texts ``{"text": ...}`` of a file, a document each; empty ones are left out.

    Raises:
        ConfigError: as ``read_lines``, or there is no text.
    """
    lines = read_lines(path, _text, skip_bad=skip_bad)
    documents = [item for item in lines.items if item]
    if not documents:
        raise ConfigError(FLAG, path, "holds no text", '{"text": "..."} on each line')
    name = Path(path).name
    return corpus_of(
        documents,
        names=[f"{name}:{n}" for n, item in zip(lines.numbers, lines.items) if item],
        name=path,
        skipped=lines.bad,
        tokenizer=tokenizer,
    )


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The object of a line in UTF-8; None where the line is blank.

    Raises:
        BadLineError: the line holds something else.
    """
    try:
        text = line.decode("utf-8").removeprefix("\ufeff").strip()
        found: Any = json.loads(text) if text else {}
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadLineError("not a JSON object")
    return found if text else None


def text_under(found: Mapping[str, Any], key: str) -> str:
    """The text that an object has under a key.

    Raises:
        BadLineError: there is none.
    """
    if key not in found:
        raise BadLineError(f"has no key {key!r}")
    text = found[key]
    if not isinstance(text, str):
        raise BadLineError(f"{key!r} is not a text")
    check_letters(text, repr(key))
    return text


def check_letters(text: str, where: str) -> None:
    """Refuses a text that is none: JSON can spell half of a surrogate pair, UTF-8 can not.

    Raises:
        BadLineError: ``where`` has such a half.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLineError(f"{where} has half of a surrogate pair") from None


def _text(found: Mapping[str, Any]) -> bytes:
    return text_under(found, "text").encode("utf-8")
