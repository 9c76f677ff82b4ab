"""A command line read word by word against the fields of a dataclass. No torch.

tyro writes ``--help``; words are checked here, so that a mistake is one ``ConfigError`` that names
the flag and what works.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any, get_type_hints

from cp_megatron.config.fields import BadValueError, Setting, setting_of_type
from cp_megatron.errors import ConfigError


def read_words(argv: Sequence[str], options: type) -> dict[str, Any]:
    """The fields of a dataclass that a command line gives.

    Args:
        argv: the words, without the program's name.
        options: the dataclass; a field is a flag, a switch has ``--no-...`` too.

    Raises:
        ConfigError: an unknown flag, one that is given twice, or a value that it does not take.
    """
    rows = [setting_of_type("", name, hint) for name, hint in get_type_hints(options).items()]
    flags = {row.flag: row for row in rows}
    flags |= {f"--no-{row.flag[2:]}": row for row in rows if row.kind == "bool"}
    values: dict[str, Any] = {}
    place = 0
    while place < len(argv):
        flag, has_value, value = argv[place].partition("=")
        place += 1
        texts = [value] if has_value else []
        while place < len(argv) and not has_value and not is_flag(argv[place]):
            texts.append(argv[place])
            place += 1
        if flag not in flags:
            raise unknown(flag, " ".join(texts), flags)
        setting = flags[flag]
        if setting.name in values:
            raise ConfigError(flag, " ".join(texts), "is given twice", "once")
        values[setting.name] = _value(setting, flag, texts)
    return values


def is_flag(word: str) -> bool:
    """A word that can not be a value: a dash, then no number."""
    return word.startswith("-") and not re.match(r"-\.?\d", word)


def unknown(flag: str, value: str, flags: Collection[str]) -> ConfigError:
    """The refusal of a word that is no flag, with those that look like it."""
    if not flag.startswith("-"):
        return ConfigError("argument", flag, "belongs to no flag", "--flag value")
    spelling = flag.replace("_", "-").lower()
    near = [spelling] if spelling in flags else difflib.get_close_matches(spelling, flags, n=3)
    return ConfigError(flag, value, "unknown flag", ", ".join(near) or "see --help")


def _value(setting: Setting, flag: str, texts: list[str]) -> Any:
    if setting.kind == "bool":
        if texts:
            raise ConfigError(flag, " ".join(texts), "is a switch and takes no value", flag)
        return flag == setting.flag
    texts, wanted = setting.words(texts), setting.count
    if not texts or (wanted and len(texts) != wanted):
        rule = f"needs {wanted or 'one or more'} value{'s' * (wanted != 1)}"
        works = ", ".join(setting.choices) or " ".join([flag, *["VALUE"] * (wanted or 2)])
        raise ConfigError(flag, " ".join(texts), rule, works)
    found = []
    for text in texts:
        try:
            found.append(setting.from_text(text))
        except BadValueError as error:
            raise ConfigError(flag, text, error.rule, error.works) from None
    return tuple(found) if setting.kind in ("strings", "ints", "floats") else found[0]
