"""Reads a command line into the values of settings: each flag with the words that follow it.

A mistake is one ``ConfigError`` that names the flag, its value and what works instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from cp_megatron.config.fields import Setting, settings_of
from cp_megatron.config.help_page import HELP, help_page
from cp_megatron.errors import ConfigError, Mistakes

Options = TypeVar("Options")


Piece = tuple[str, list[str]]
"""A flag with the words that follow it."""

_TRUTHS: Mapping[str, bool] = {
    **dict.fromkeys(("true", "yes", "1"), True),
    **dict.fromkeys(("false", "no", "0"), False),
}


def read_options(
    argv: Sequence[str], options: type[Options], *, program: str, description: str | None
) -> Options:
    """Reads a command line into a dataclass, whose fields are the flags.

    Args:
        argv: the command line without the program's name.
        program: the program's name, for ``--help``.
        description: what the program does, for ``--help``.

    Raises:
        ConfigError: a flag or a value is not accepted.
        SystemExit: with code 0, after ``--help`` is printed.
    """
    if HELP & set(argv):
        print(help_page(program, description, {"flags": options()}))
        raise SystemExit(0)
    mistakes = Mistakes()
    values = read_pieces(split_words(argv), spellings(settings_of(options)), mistakes)
    mistakes.raise_any()
    return options(**values)


def spellings(
    rows: Iterable[Setting], aliases: Mapping[str, str] | None = None
) -> dict[str, Setting]:
    """The settings by every spelling of their flags: the flag, ``--no-...`` and other names."""
    flags = {row.flag: row for row in rows}
    flags |= {row.off_flag: row for row in flags.values() if row.kind == "bool"}
    return flags | {alias: flags[flag] for alias, flag in (aliases or {}).items()}


def read_pieces(
    pieces: Iterable[Piece],
    flags: Mapping[str, Setting],
    mistakes: Mistakes,
    synonym: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """The values that a command line gives, by the settings' names.

    Args:
        pieces: the flags with their words.
        flags: the settings that the program knows, by every spelling of their flags.
        mistakes: receives an error for each flag that is unknown, is given with two values or does
            not accept its value.
        synonym: raises an error of its own for some of the unknown flags, given with their values.
    """
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for flag, words in pieces:
        text = " ".join(words)
        with mistakes.collect():
            if flag not in flags:
                if synonym is not None:
                    synonym(flag, text)
                name = flag.replace("_", "-").lower()
                near = [name] if name in flags else difflib.get_close_matches(name, flags, n=3)
                raise ConfigError(flag, text, "unknown flag", ", ".join(near) or "see --help")
            row, whole = flags[flag], f"{flag} {text}".rstrip()
            if row.kind == "bool":
                off = flag == row.off_flag
                value = truth(flag, words, f"{row.flag} or {row.off_flag}") != off
            else:
                value = row.from_words(words)
            if values.setdefault(row.name, value) != value:  # One of the two would be ignored.
                first = texts[row.name]
                raise ConfigError(flag, text, f"contradicts {first}", f"{first}, or {whole}")
            texts[row.name] = whole
    return values


def truth(flag: str, words: Sequence[str], works: str = "") -> bool:
    """Whether a switch is on: alone, or before a word such as true.

    Raises:
        ConfigError: other words follow it.
    """
    value = _TRUTHS.get(words[0].lower()) if len(words) == 1 else None
    if words and value is None:
        rule = "is a switch, which only true or false may follow"
        raise ConfigError(flag, " ".join(words), rule, works or flag)
    return True if value is None else value


def split_words(argv: Sequence[str]) -> list[Piece]:
    """Each flag with the words up to the next one. A dash and a digit begin a number.

    Raises:
        ConfigError: the first word is not a flag.
    """
    pieces: list[Piece] = []
    for word in argv:
        if word.startswith("-") and not re.match(r"-\.?\d", word):
            flag, equals, value = word.partition("=")
            pieces.append((flag, [value] if equals else []))
        elif pieces:
            pieces[-1][1].append(word)
        else:
            raise ConfigError("argument", word, "belongs to no flag", "--flag value")
    return pieces
