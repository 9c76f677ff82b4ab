"""config.json as JSON whose types are not trusted, and what its keys are called here. No torch."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cp_megatron.errors import ConfigError

HF_CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 24
LARGEST = 2**31 - 1

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
    }
)
# rope type -> key of config.json -> field of ModelConfig
ROPE_KEYS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "default": {},
        "linear": {"factor": "rope_scaling_factor"},
        "dynamic": {"factor": "rope_scaling_factor"},
        "yarn": {
            "factor": "rope_scaling_factor",
            "original_max_position_embeddings": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "rope_attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
            "truncate": "rope_truncate",
        },
        "llama3": {
            "factor": "rope_scaling_factor",
            "original_max_position_embeddings": "original_max_position_embeddings",
            "low_freq_factor": "rope_low_freq_factor",
            "high_freq_factor": "rope_high_freq_factor",
        },
        "longrope": {
            "factor": "rope_scaling_factor",
            "original_max_position_embeddings": "original_max_position_embeddings",
            "attention_factor": "rope_attention_factor",
            "short_factor": "rope_short_factor",
            "long_factor": "rope_long_factor",
        },
    }
)


def read_json(folder: Path, flag: str) -> dict[str, Any]:
    """The object in a folder's config.json.

    Raises:
        ConfigError: it can not be read, or is no JSON object.
    """
    path = folder / HF_CONFIG
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CONFIG_BYTES:
            raise ConfigError(flag, folder, f"{HF_CONFIG} is not a regular file of a sane size")
        document = json.loads(path.read_bytes())
    except ConfigError:
        raise
    except OSError as error:
        rule = f"is no Hugging Face folder: {HF_CONFIG} can not be read ({error.strerror})"
        raise ConfigError(flag, folder, rule, "a folder with config.json and safetensors") from None
    except (ValueError, RecursionError):
        raise ConfigError(flag, folder, f"{HF_CONFIG} is not JSON") from None
    if not isinstance(document, dict):
        raise ConfigError(flag, folder, f"{HF_CONFIG} must hold an object")
    return document


@dataclass(frozen=True)
class JsonFields:
    """Typed access to a JSON object; null is the same as missing, as in transformers."""

    folder: Path
    flag: str
    where: str
    value: dict[str, Any]

    def wrong(self, name: str, rule: str, works: str = "") -> ConfigError:
        """The error that names the file, the key and what it holds."""
        shown = " ".join(str(self.value.get(name)).split())[:60]
        rule = f"{HF_CONFIG}: {self.where}{name} {shown} {rule}"
        return ConfigError(self.flag, self.folder, rule, works)

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number from 1."""
        value = self.value.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise self.wrong(name, f"must be a whole number from 1 to {LARGEST}")
        return value

    def number(self, name: str, default: float) -> float:
        """A number, 0 or more."""
        value = self.value.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 <= value <= 1e30:  # NaN fails too
            raise self.wrong(name, "must be a number, 0 or more")
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.value.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """A list of positive numbers, or None."""
        value = self.value.get(name)
        if value is None:
            return None
        good = isinstance(value, list) and all(
            type(x) in (int, float) and 0 < x <= 1e30 for x in value
        )
        if not good:
            raise self.wrong(name, "must be a list of positive numbers")
        return tuple(float(x) for x in value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object, by default an empty one."""
        value = self.value.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "must be an object")
        return value or {}

    def token(self, name: str) -> int | None:
        """The id of a token, the first of several; None where there is none."""
        value = self.value.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None or value == []:
            return None
        if type(value) is not int or not -1 <= value <= LARGEST:
            raise self.wrong(name, "must be the id of a token")
        return value if value >= 0 else None
