"""Typed access to config.json. Its keys and values are not trusted."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cp_megatron.config.files.foreign_folders import HF_CONFIG, LOAD_HF, recognize
from cp_megatron.errors import ConfigError

FLAG = LOAD_HF
_LARGEST = 2**31 - 1


def file_size(folder: Path, name: str) -> int:
    """Returns the size of a regular file in bytes. Reading a pipe or a device might never end.

    Raises:
        ConfigError: the file is missing or not a regular file.
    """
    try:
        status = (folder / name).stat()
    except OSError as error:
        rule = f"{name} is missing or cannot be read ({error.strerror})"
        unknown = ConfigError(FLAG, folder, rule, "a folder with config.json and safetensors")
        raise recognize(FLAG, folder) or unknown from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(FLAG, folder, f"{name} is not a regular file")
    return status.st_size


def read_json(folder: Path, name: str = HF_CONFIG, *, max_bytes: int = 1 << 24) -> dict[str, Any]:
    """Reads the JSON object in a file of a folder.

    Raises:
        ConfigError: the file cannot be read, is too large or is not a JSON object.
    """
    if file_size(folder, name) > max_bytes:
        raise ConfigError(FLAG, folder, f"{name} has more than {max_bytes} bytes")
    try:
        document = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        raise ConfigError(FLAG, folder, f"{name} cannot be read, or is not JSON") from None
    if not isinstance(document, dict):
        raise ConfigError(FLAG, folder, f"{name} is not a JSON object")
    return document


@dataclass(frozen=True)
class JsonFields:
    """A JSON object of config.json.

    Attributes:
        folder: the folder of config.json, for error messages.
        value: the object.
        prefix: the path of the object inside config.json, for example ``rope_scaling.``.
        defaults: the values of keys that are missing. A key that is null is not missing: the
            default that the caller of a method passes applies to it.
        alternative: what runs the models that ``unsupported`` refuses; empty if nothing does.

    Methods that read a key raise a ``ConfigError`` if its value is not what they return. The error
    names the file, the key and the value.
    """

    folder: Path
    value: dict[str, Any]
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    alternative: str = ""

    def get(self, name: str) -> Any:
        """Returns the value of a key unchecked, or its default; None if it has neither."""
        value = self.value.get(name)
        return self.defaults.get(name) if value is None and name not in self.value else value

    def wrong(self, name: str, rule: str, works: str = "") -> ConfigError:
        """Makes the error that names the file, the key, its value and the rule."""
        value = self.get(name)
        missing = value is None and name not in self.value
        shown = "is missing" if missing else f"is {json.dumps(value)[:60]}"
        rule = f"{HF_CONFIG}: {self.prefix}{name} {shown}, {rule}"
        return ConfigError(FLAG, self.folder, rule, works)

    def unsupported(self, name: str, works: str, why: str = "") -> ConfigError:
        """Makes the error for a value that is valid, but that this program does not support."""
        works = ", or ".join(filter(None, (works, self.alternative)))
        return self.wrong(name, f"which is not supported{f': {why}' if why else ''}", works)

    def only(self, name: str, *supported: object, why: str = "", works: str = "") -> None:
        """Refuses every value of a key other than ``supported``; the key may be missing or null.

        Args:
            name: the key.
            supported: the values; types count, so that 1, 1.0 and true differ.
            why: the reason, as a clause.
            works: what works instead; by default the first supported value.

        Raises:
            ConfigError: the key has another value.
        """
        value = self.get(name)
        if value is not None and not any(type(value) is type(x) and value == x for x in supported):
            raise self.unsupported(name, works or json.dumps(supported[0]), why)

    def size(self, name: str, default: int | None = None) -> int:
        """Returns a whole number of at least 1 and below 2^31."""
        value = self._get(name, default)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise self.wrong(name, f"but must be a whole number from 1 to {_LARGEST}")
        return value

    def number(self, name: str, default: float = 0.0) -> float:
        """Returns a number from 0 to 1e30."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 <= value <= 1e30:  # NaN fails too
            raise self.wrong(name, "but must be a number from 0 to 1e30")
        return float(value)

    def switch(self, name: str, default: bool = False) -> bool:
        """Returns true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "but must be true or false")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """Returns a list of positive numbers up to 1e30, which may be empty."""
        value = self.get(name)
        items: list[Any] = value if isinstance(value, list) else [None]
        if not all(type(x) in (int, float) and 0 < x <= 1e30 for x in items):
            raise self.wrong(name, "but must be a list of positive numbers")
        return tuple(float(x) for x in items)

    def inner(self, name: str) -> JsonFields:
        """Returns the object under a key, which is empty if the key is missing."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "but must be an object")
        path = f"{self.prefix}{name}."
        return JsonFields(self.folder, value, path, alternative=self.alternative)

    def _get(self, name: str, default: Any) -> Any:
        value = self.get(name)
        return default if value is None else value
