"""Rotary embeddings in config.json, in both generations of its keys.

transformers 4 stores ``rope_theta`` beside ``rope_scaling``; transformers 5 stores both in
``rope_parameters``. Both are read, and both are written, so that either generation loads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.json_fields import JsonFields

_ORIGINAL = "original_max_position_embeddings"
_FIELDS: Mapping[str, str] = {
    "factor": "rope_scaling_factor",
    _ORIGINAL: _ORIGINAL,
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "rope_attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "rope_truncate",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "short_factor": "rope_short_factor",
    "long_factor": "rope_long_factor",
}
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_SHARED = ("factor", _ORIGINAL, "attention_factor")
# For each rope type, the required and the optional keys.
_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": ((), (*_SHARED, *_YARN)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "longrope": (("short_factor", "long_factor"), _SHARED),
}
ROPE_KEYS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        kind: {key: field for key, field in _FIELDS.items() if key in required + optional}
        for kind, (required, optional) in _KEYS.items()
    }
)
"""For each rope type, the keys of config.json and the fields of ``ModelConfig`` they set."""
ROPE_FIELDS = frozenset(_FIELDS.values())
"""The fields of ``ModelConfig`` that at least one rope type reads."""


def fields_of(rope_type: str) -> frozenset[str]:
    """The fields of ``ModelConfig`` that a rope type reads."""
    more = {_ORIGINAL} if rope_type == "dynamic" else set()
    return frozenset(ROPE_KEYS[rope_type].values()) | more


def read_rope(fields: JsonFields, positions: int) -> dict[str, Any]:
    """Reads the fields of ``ModelConfig`` that describe rotary embeddings.

    ``positions`` is the longest sequence, in tokens, that config.json names.
    """
    scaling = fields.inner("rope_scaling")
    rope = scaling if scaling.value else fields.inner("rope_parameters")
    base = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if not base > 1:
        at = rope if rope.value.get("rope_theta") is not None else fields
        raise at.wrong("rope_theta", "but must be greater than 1")
    kind = _rope_type(rope)
    values: dict[str, Any] = {"rotary_base": base, "rope_type": kind}
    readers: dict[str, Callable[[str], Any]] = {"truncate": rope.switch, _ORIGINAL: rope.size}
    readers |= dict.fromkeys(("short_factor", "long_factor"), rope.numbers)
    for key, field in ROPE_KEYS[kind].items():
        if rope.value.get(key) is not None:
            values[field] = readers.get(key, rope.number)(key)
    if kind in ("yarn", "llama3", "longrope"):
        values[_ORIGINAL] = fields.size(_ORIGINAL, values.get(_ORIGINAL, positions))
    elif kind == "dynamic":
        values[_ORIGINAL] = positions
    if kind in ("yarn", "longrope"):
        values.setdefault("rope_scaling_factor", positions / values[_ORIGINAL])
    return values


def _rope_type(rope: JsonFields) -> str:
    """The rope type; every key beside it is known, and every required one is there."""
    name = "type" if rope.value.get("rope_type") is None else "rope_type"
    kind = "default" if rope.value.get(name) is None else rope.value[name]
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise rope.unsupported(name, ", ".join(ROPE_KEYS))
    rope.only("partial_rotary_factor", 1, 1.0)
    known = {*ROPE_KEYS[kind], "rope_theta", "rope_type", "type", "partial_rotary_factor"}
    for key, value in rope.value.items():
        if key not in known and value is not None:
            raise rope.unsupported(key, f"no {key}", f"rope type {kind} does not read it")
    for key in _KEYS[kind][0]:
        if rope.value.get(key) is None:
            raise rope.wrong(key, f"but rope type {kind} requires it")
    return kind


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Writes the entries of config.json that describe rotary embeddings."""
    scaling: dict[str, Any] = {"rope_type": model.rope_type}
    for key, field in ROPE_KEYS[model.rope_type].items():
        value = model.original_length if key == _ORIGINAL else getattr(model, field)
        if value is not None:
            scaling[key] = list(value) if isinstance(value, tuple) else value
    if model.rope_type == "longrope" and "factor" not in scaling:
        original = model.original_length or 1
        scaling["factor"] = (model.max_position_embeddings or original) / original
    return {
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling if model.rope_type != "default" else None,
        "rope_parameters": {**scaling, "rope_theta": model.rotary_base},
    }
