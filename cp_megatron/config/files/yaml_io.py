"""Writes a configuration as YAML and reads settings back, refusing every key that is not valid.

``to_yaml`` writes a run's ``config.yaml`` with every setting, so that the run does not depend on
the defaults of a later version. A file for ``--config`` may hold any of the settings.
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
from cp_megatron.config.files.alternatives import with_alternatives_off
from cp_megatron.config.schema import Config
from cp_megatron.errors import ConfigError

# PyYAML raises these for dates and numbers that it cannot build, and for deep nesting.
_YAML_ERRORS = (
    *(yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError),
    *(RecursionError, AttributeError),
)

Values = Mapping[str, Any]
"""Checked values of settings by name."""
LARGEST = 1 << 20
"""Largest number of bytes of a file, and of letters of its values with aliases written out."""


def to_yaml(config: Config) -> str:
    """All settings of ``config`` as YAML, in the order of the dataclasses."""
    plain = dataclasses.asdict(config)
    readable = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    # PyYAML writes Unicode line breaks unescaped and would read them back as spaces.
    if any(mark in readable for mark in "\x85\u2028\u2029"):
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=False)
    return readable


def overlay(base: Config, values: Values) -> Config:
    """``base`` with the values of some settings replaced.

    Raises:
        ConfigError: two of the values contradict each other.
    """
    for name, value in with_alternatives_off(values).items():
        section = settings()[name].section
        if section:
            value = dataclasses.replace(getattr(base, section), **{name: value})
        base = dataclasses.replace(base, **{section or name: value})
    return base


def read_file(path: Path, flag: str) -> str:
    """The text of a configuration file, which ``flag`` names.

    Raises:
        ConfigError: the file cannot be read as text.
    """
    try:
        status = path.stat()
        # Reading a pipe or a device might never end.
        if path.is_dir() or (path.is_file() and status.st_size <= LARGEST):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(flag, path, "is not UTF-8 text", "a YAML file") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(flag, path, f"cannot be read: {reason}") from None
    rule = f"is not a regular file of at most {LARGEST} bytes"
    raise ConfigError(flag, path, rule, "a YAML file")


def read_values(text: str, source: str) -> Values:
    """The settings that a YAML text holds, by name.

    Args:
        source: where the text comes from, for messages.

    Raises:
        ConfigError: the text is not valid YAML, or it has an unknown key or a wrong value.
    """
    sections = {row.section for row in settings().values()} - {""}
    values: dict[str, Any] = {}
    for key, entry in _mapping(_parse(text, source), source, "").items():
        section = key if key in sections else ""
        for name, value in (_mapping(entry, source, key) if section else {key: entry}).items():
            values[name] = _checked(section, name, value, source)
    return values


def _parse(text: str, source: str) -> Any:
    # libyaml's parser takes a tenth of the time, where PyYAML was built with it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        if _size(node, {}) > LARGEST:
            raise ValueError("its aliases repeat too much")
        _refuse_doubled_keys(node, source)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(source, "", f"is not valid YAML: {error.problem}{place}") from None
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ConfigError(source, "", f"is not valid YAML: {reason}") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Letters and nodes of a value with aliases written out; infinite if it contains itself."""
    if node is None:
        return 0
    if id(node) not in known:
        known[id(node)] = math.inf  # until its own size is known
        if isinstance(node, yaml.ScalarNode):
            size: float = len(node.value)
        elif isinstance(node, yaml.MappingNode):
            size = sum(_size(inner, known) for pair in node.value for inner in pair)
        else:
            size = sum(_size(inner, known) for inner in node.value)
        known[id(node)] = 1 + size
    return known[id(node)]


def _refuse_doubled_keys(node: yaml.Node | None, source: str, levels: int = 2) -> None:
    """Refuses equal keys, of which PyYAML would silently keep the last."""
    if not isinstance(node, yaml.MappingNode) or not levels:
        return
    seen: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                rule = f"is given twice, again on line {key.start_mark.line + 1}"
                raise ConfigError(source, key.value, rule)
            seen.add(key.value)
        _refuse_doubled_keys(value, source, levels - 1)


def _mapping(entry: Any, source: str, key: str) -> dict[str, Any]:
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        where = f"{source}: {key}" if key else source
        raise ConfigError(where, shown(entry), "must hold keys and values")
    return entry


def _checked(section: str, name: Any, value: Any, source: str) -> Any:
    setting = settings().get(name) if isinstance(name, str) else None
    key = shown(f"{section}.{name}" if section else name)
    if setting is None or setting.section != section:
        known = {name for row in settings().values() for name in (row.section, row.key)}
        near = [setting.key] if setting else difflib.get_close_matches(key, known)
        raise ConfigError(f"{source}: {key}", shown(value), "unknown key", ", ".join(near))
    try:
        return setting.from_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {key}", shown(value), error.rule, error.works) from None
