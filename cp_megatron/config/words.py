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
from cp_megatron.errors import ConfigError

Options = TypeVar("Options")


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
    return options(**read_words(argv, settings_of(options)))


def read_words(
    argv: Sequence[str],
    rows: Iterable[Setting],
    *,
    aliases: Mapping[str, str] | None = None,
    refuse: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """The values that a command line gives, by the settings' names.

    Args:
        argv: the command line without the program's name.
        rows: the settings that the program knows.
        aliases: other names of flags.
        refuse: raises an error of its own for some of the unknown flags, given with their values.

    Raises:
        ConfigError: a flag is unknown or given with two values, or it does not accept its value.
    """
    flags = {row.flag: row for row in rows}
    flags |= {row.off_flag: row for row in flags.values() if row.kind == "bool"}
    flags |= {alias: flags[flag] for alias, flag in (aliases or {}).items()}
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for flag, words in _split(argv):
        text = " ".join(words)
        if flag not in flags:
            if refuse is not None:
                refuse(flag, text)
            name = flag.replace("_", "-").lower()
            near = [name] if name in flags else difflib.get_close_matches(name, flags, n=3)
            raise ConfigError(flag, text, "unknown flag", ", ".join(near) or "see --help")
        row, whole = flags[flag], f"{flag} {text}".rstrip()
        if row.kind == "bool" and words:
            rule = "is a switch and takes no value"
            raise ConfigError(flag, text, rule, f"{row.flag} or {row.off_flag}")
        value = flag != row.off_flag if row.kind == "bool" else row.from_words(words)
        if values.setdefault(row.name, value) != value:  # One of the two would be ignored.
            first = texts[row.name]
            raise ConfigError(flag, text, f"contradicts {first}", f"{first}, or {whole}")
        texts[row.name] = whole
    return values


def _split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words up to the next one. A dash and a digit begin a number."""
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
