"""What a user is told about a folder that no family reads."""

from __future__ import annotations

import re
from typing import Any

from cp_megatron.errors import ConfigError
from cp_megatron.families.json_fields import JsonFields

_ADAPTER = 'attn_implementation="cp_megatron" in transformers'
_EXPERTS = re.compile(r"(moe_)?(num|n)(_local|_routed)?_experts")
ADAPTER_SERVES: frozenset[str] = frozenset(())
"""Architectures that the adapter computes on two ranks as transformers does on one, as
benchmarks/families.py reports of transformers 5.24."""


def alternative_of(architecture: str) -> str:
    """What trains a model of this architecture that its family refuses; empty if nothing does."""
    return _ADAPTER if architecture in ADAPTER_SERVES else ""


def experts_key(entries: dict[str, Any]) -> str | None:
    """The key of config.json that says that the model is a mixture of several experts."""
    for key, value in entries.items():
        if _EXPERTS.fullmatch(key) and type(value) is int and value > 1:
            return key
    return None


def unknown_architecture(fields: JsonFields, key: str, name: str, known: str) -> ConfigError:
    """Makes the error for an architecture, named under ``key``, that no family has.

    It says whether the model is a mixture of experts and whether the adapter serves it.
    """
    parts = (fields.value, *(x for x in fields.value.values() if isinstance(x, dict)))
    why = [
        f"it is a mixture of {entries[experts]} experts"
        for entries in parts
        if (experts := experts_key(entries))
    ][:1]
    if isinstance(fields.value.get("text_config"), dict):
        why.append("it reads more than text; a folder of its language model alone may be supported")
    wanted = f"{name}forcausallm" if key == "model_type" else name
    plain = {architecture.lower() for architecture in ADAPTER_SERVES}
    serves = wanted.replace("_", "").lower() in plain
    why.append(f"{_ADAPTER} {'computes' if serves else 'is not known to compute'} it")
    return fields.unsupported(key, known, "; ".join(why))
