"""A configuration as YAML, and back. Strict: an unknown, doubled or mistyped key is refused.

A run's ``config.yaml`` is written by ``to_yaml`` and spells every setting out, so that what a run
was does not depend on the defaults of a later version. A file for ``--config`` may hold any part.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cp_megatron.config.fields import settings, shown
from cp_megatron.config.files.presets import DEFAULT_PRESET, PRESETS
from cp_megatron.config.schema import Config
from cp_megatron.errors import ConfigError

# PyYAML lets errors of the types it builds (dates, numbers) through as they are.
_LET_THROUGH = (
    *(yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError),
    *(RecursionError, AttributeError),
)

Values = Mapping[str, Any]
"""Settings by name, checked."""
LARGEST = 1 << 20
"""Bytes of a file, and letters of its values where aliases stand for the same ones again."""


def to_yaml(config: Config) -> str:
    """Every setting of ``config``, in the order of the dataclasses."""
    plain = dataclasses.asdict(config)
    plain["data"]["data_path"] = list(config.data.data_path)
    readable = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    # PyYAML writes the line breaks of Unicode as they are and reads them back as spaces.
    if any(mark in readable for mark in "\x85\u2028\u2029"):
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=False)
    return readable


def from_yaml(text: str, source: str) -> Config:
    """The configuration that ``text`` spells out; what it leaves out comes from its preset.

    Args:
        text: the YAML text.
        source: where the text comes from, for messages.

    Raises:
        ConfigError: the text is no YAML, or has an unknown key or a wrong value.
    """
    values = read_values(text, source)
    return overlay(preset_named(values.get("preset", DEFAULT_PRESET), f"{source}: preset"), values)


def preset_named(name: str, flag: str = "--preset") -> Config:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(flag, name, "is no preset", ", ".join(PRESETS))
    return PRESETS[name]


def overlay(base: Config, values: Values) -> Config:
    """``base`` with the settings of ``values`` put in."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        sections.setdefault(settings()[name].section, {})[name] = value
    top = sections.pop("", {})
    inner = {
        section: dataclasses.replace(getattr(base, section), **changes)
        for section, changes in sections.items()
    }
    return dataclasses.replace(base, **top, **inner)


def read_file(path: Path, flag: str) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: it can not be read as text.
    """
    try:
        status = path.stat()
        # Reading a pipe would wait for ever, reading a device would not end.
        if not path.is_dir() and (not path.is_file() or status.st_size > LARGEST):
            rule = f"is not a regular file of at most {LARGEST} bytes"
            raise ConfigError(flag, path, rule, "a YAML file")
        return path.read_text(encoding="utf-8")
    except ConfigError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(flag, path, "is not UTF-8 text", "a YAML file") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(flag, path, f"can not be read: {reason}") from None


def read_values(text: str, source: str) -> Values:
    """The settings that ``text`` holds, by name, each checked against its type.

    Raises:
        ConfigError: as ``from_yaml``.
    """
    document = _parse(text, source)
    values: dict[str, Any] = {}
    for key, entry in _mapping(document, source, "").items():
        if key in _sections():
            for name, value in _mapping(entry, source, key).items():
                values[name] = _checked(key, name, value, source)
        else:
            values[key] = _checked("", key, entry, source)
    return values


def _parse(text: str, source: str) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _size(node, {}) > LARGEST:
            raise ConfigError(source, "", "is no YAML: its aliases repeat too much")
        _refuse_doubled_keys(node, source)
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(source, "", f"is no YAML: {error.problem}{place}") from None
    except ConfigError:
        raise
    except _LET_THROUGH as error:
        reason = " ".join(str(error).split())
        raise ConfigError(source, "", f"is no YAML: {reason}") from None


def _size(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Letters and nodes of a value with aliases written out; infinite where one is in itself."""
    if node is None:
        return 0
    if id(node) not in known:
        known[id(node)] = math.inf  # as long as it is not finished
        if isinstance(node, yaml.ScalarNode):
            size: float = len(node.value)
        elif isinstance(node, yaml.MappingNode):
            size = sum(_size(inner, known) for pair in node.value for inner in pair)
        else:
            size = sum(_size(inner, known) for inner in node.value)
        known[id(node)] = 1 + size
    return known[id(node)]


def _refuse_doubled_keys(node: yaml.Node | None, source: str) -> None:
    """PyYAML would silently keep the last of two equal keys. Two levels are all we read."""
    levels = [node]
    for _ in range(2):
        inner: list[yaml.Node | None] = []
        for mapping in levels:
            if not isinstance(mapping, yaml.MappingNode):
                continue
            seen: set[str] = set()
            for key, value in mapping.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise ConfigError(source, key.value, f"stands twice, line {line}")
                    seen.add(key.value)
                inner.append(value)
        levels = inner


def _mapping(entry: Any, source: str, key: str) -> dict[str, Any]:
    """``entry`` as a mapping; an empty file or section holds nothing."""
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        where = f"{source}: {key}" if key else source
        raise ConfigError(where, shown(entry), "must hold keys and values")
    return entry


def _sections() -> list[str]:
    return sorted({setting.section for setting in settings().values()} - {""})


def _checked(section: str, name: Any, value: Any, source: str) -> Any:
    setting = settings().get(name) if isinstance(name, str) else None
    key = shown(f"{section}.{name}" if section else name)
    if setting is None or setting.section != section:
        known = [*_sections(), *(row.key for row in settings().values())]
        near = [setting.key] if setting else difflib.get_close_matches(key, known)
        raise ConfigError(f"{source}: {key}", shown(value), "unknown key", ", ".join(near))
    try:
        return setting.from_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {key}", shown(value), error.rule, error.works) from None
