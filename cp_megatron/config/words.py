"""Reads a command line into settings: each flag with the words that follow it.

A mistake is one ``ConfigError`` that names the flag, its value and what works instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cp_megatron.config.fields import Setting, settings_of
from cp_megatron.config.help_page import HELP, help_page
from cp_megatron.errors import ConfigError

Options = TypeVar("Options")


@dataclass(frozen=True)
class Word:
    """A flag that a user typed: its setting, its value, and its text for messages."""

    setting: Setting
    value: Any
    text: str


def read_options(
    argv: Sequence[str], options: type[Options], *, program: str, description: str | None
) -> Options:
    """Reads a whole command line into a dataclass, whose fields are the flags.

    Args:
        argv: the command line without the program's name.
        options: the dataclass.
        program: the program's name, for ``--help``.
        description: the description, for ``--help``.

    Raises:
        ConfigError: a flag or a value is not accepted.
        SystemExit: with code 0, after ``--help`` is printed.
    """
    if HELP & set(argv):
        print(help_page(program, description, {"flags": options()}))
        raise SystemExit(0)
    words = read_words(argv, settings_of(options))
    return options(**{name: word.value for name, word in words.items()})


def read_words(
    argv: Sequence[str],
    rows: Iterable[Setting],
    *,
    aliases: Mapping[str, str] | None = None,
    refuse: Callable[[str, str], None] | None = None,
) -> dict[str, Word]:
    """The settings that a command line gives, by name.

    Args:
        argv: the command line without the program's name.
        rows: the settings that the program knows.
        aliases: other names of flags.
        refuse: raises the error for an unknown flag and its value if there is a special one.

    Raises:
        ConfigError: a flag is unknown or given with two values, or it does not accept its value.
    """
    flags = {row.flag: row for row in rows}
    flags |= {row.off_flag: row for row in flags.values() if row.kind == "bool"}
    flags |= {alias: flags[flag] for alias, flag in (aliases or {}).items()}
    words: dict[str, Word] = {}
    for flag, texts in _split(argv):
        value = " ".join(texts)
        if flag not in flags:
            if refuse is not None:
                refuse(flag, value)
            raise _unknown(flag, value, flags)
        row = flags[flag]
        word = Word(row, _value(row, flag, texts), f"{flag} {value}".rstrip())
        first = words.setdefault(row.name, word)
        if first.value != word.value:  # One of the two would be ignored.
            works = f"{first.text}, or {word.text}"
            raise ConfigError(flag, value, f"contradicts {first.text}", works)
    return words


def _split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words up to the next one. A dash and a digit begin a number, no flag."""
    pieces: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("-") and not re.match(r"-\.?\d", word):
            flag, equals, value = word.partition("=")
            pieces.append((flag, [value] if equals else []))
        elif pieces:
            pieces[-1][1].append(word)
        else:
            raise ConfigError("argument", word, "belongs to no flag", "--flag value")
    return pieces


def _value(row: Setting, flag: str, texts: Sequence[str]) -> Any:
    if row.kind != "bool":
        return row.from_words(texts)
    if texts:
        rule = "is a switch and takes no value"
        raise ConfigError(flag, " ".join(texts), rule, f"{row.flag} or {row.off_flag}")
    return flag != row.off_flag


def _unknown(flag: str, value: str, flags: Collection[str]) -> ConfigError:
    spelling = flag.replace("_", "-").lower()
    near = [spelling] if spelling in flags else difflib.get_close_matches(spelling, flags, n=3)
    return ConfigError(flag, value, "unknown flag", ", ".join(near) or "see --help")
