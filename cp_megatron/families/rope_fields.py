"""Rotary embeddings in config.json, in both generations of its keys.

transformers 4 stores ``rope_theta`` beside ``rope_scaling``; transformers 5 stores both in
``rope_parameters``. Both are read, and both are written, so that either generation loads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.json_fields import JsonFields

_ORIGINAL, _PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"
LAYER_KINDS = ("full_attention", "sliding_attention")
"""The kinds of layers in ``layer_types`` and ``rope_parameters``: without and with a window."""
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
ROTARY_FIELDS = (
    *("window_rotary_base", "rotary_percent", "rotary_interleaved", "no_rope_layers"),
    "query_temperature_beta",
)
"""The fields of ``ModelConfig``, beside the base and the type, that change every rotation."""


def fields_of(rope_type: str) -> frozenset[str]:
    """The fields of ``ModelConfig`` that a rope type reads."""
    more = {_ORIGINAL} if rope_type == "dynamic" else set()
    return frozenset(ROPE_KEYS[rope_type].values()) | more


def unread_fields(model: ModelConfig) -> frozenset[str]:
    """The fields in ``ROPE_FIELDS`` that the rotation of a model with rope does not read."""
    also = {_ORIGINAL} if model.query_temperature_beta else set()
    return ROPE_FIELDS - fields_of(model.rope_type) - also


def read_rope(
    fields: JsonFields,
    positions: int,
    *,
    window_base: float | None = None,
    more: Mapping[str, str | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """Reads the fields of ``ModelConfig`` that describe rotary embeddings.

    A family that rotates a share of a head's channels has a default of ``partial_rotary_factor``.

    Args:
        fields: config.json.
        positions: the longest sequence, in tokens, that it names.
        window_base: in families whose layers with a window rotate with another base, the default of
            ``rope_local_base_freq``. transformers 5 has an object for each kind of layer inside
            ``rope_parameters`` instead.
        more: keys of the family beside those of the rope type, with the fields that they set, or
            None for a key without effect.

    Raises:
        ConfigError: a value is malformed or not supported, or a key is missing.
    """
    scaling, parameters = fields.inner("rope_scaling"), fields.inner("rope_parameters")
    if window_base is None:
        return _read_one(fields, scaling if scaling.value else parameters, positions, more)
    if parameters.value and not parameters.value.keys() <= {*LAYER_KINDS}:
        raise fields.unsupported("rope_parameters", f"objects {' and '.join(LAYER_KINDS)} in it")
    whole, local = (parameters.inner(kind) for kind in LAYER_KINDS)
    whole = replace(whole, value={**whole.value, **scaling.value})
    values = _read_one(fields, whole, positions, more)
    window_base = fields.number("rope_local_base_freq", window_base)
    outer = replace(fields, value={**fields.value, "rope_theta": window_base})
    windowed = _read_one(outer, local, positions, more)
    if windowed == values:
        return values
    if windowed["rope_type"] != "default":
        raise local.unsupported("rope_type", "default", "the frequencies of windows are unscaled")
    if windowed.get("rotary_percent") != values.get("rotary_percent"):
        raise local.unsupported("partial_rotary_factor", "that of full_attention")
    return {**values, "window_rotary_base": windowed["rotary_base"]}


def _read_one(
    fields: JsonFields, rope: JsonFields, positions: int, more: Mapping[str, str | None]
) -> dict[str, Any]:
    """Reads the object of one kind of layer; ``fields`` has what the object lacks."""
    base = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if not base > 1:
        at = rope if rope.value.get("rope_theta") is not None else fields
        raise at.wrong("rope_theta", "but must be greater than 1")
    kind = _rope_type(rope, more)
    values: dict[str, Any] = {"rotary_base": base, "rope_type": kind}
    values |= _read_partial(fields, rope)
    readers: dict[str, Callable[[str], Any]] = {"truncate": rope.switch, _ORIGINAL: rope.size}
    readers |= dict.fromkeys(("short_factor", "long_factor"), rope.numbers)
    for key, field in {**more, **ROPE_KEYS[kind]}.items():
        if rope.value.get(key) is not None and field is not None:
            values[field] = readers.get(key, rope.number)(key)
    if kind in ("yarn", "llama3", "longrope"):
        values[_ORIGINAL] = fields.size(_ORIGINAL, values.get(_ORIGINAL, positions))
    elif kind == "dynamic":
        values[_ORIGINAL] = positions
    if kind in ("yarn", "longrope"):
        values.setdefault("rope_scaling_factor", positions / values[_ORIGINAL])
    return values


def _read_partial(fields: JsonFields, rope: JsonFields) -> dict[str, float]:
    """The share of the channels that is rotated, from the object or from beside it."""
    if _PARTIAL not in fields.defaults:
        for place in (fields, rope):
            place.only(_PARTIAL, 1, 1.0, why="whole heads are rotated")
        return {}
    fields.get(_PARTIAL)  # the object comes first, as in transformers
    place = fields if rope.value.get(_PARTIAL) is None else rope
    share = place.number(_PARTIAL, 1.0)
    if not 0 < share <= 1:
        raise place.wrong(_PARTIAL, "but must be greater than 0 and at most 1")
    return {"rotary_percent": share}


def _rope_type(rope: JsonFields, more: Mapping[str, str | None]) -> str:
    """Returns the rope type; refuses keys that it does not read, and a lack of those it needs."""
    name = "type" if rope.value.get("rope_type") is None else "rope_type"
    kind = "default" if rope.value.get(name) is None else rope.value[name]
    kind = "longrope" if kind == "su" else kind  # its name in the first files of Phi-3
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise rope.unsupported(name, ", ".join(ROPE_KEYS))
    known = {*ROPE_KEYS[kind], *more, "rope_theta", "rope_type", "type", _PARTIAL}
    for key, value in rope.value.items():
        if key not in known and value is not None:
            raise rope.unsupported(key, f"no {key}", f"rope type {kind} does not read it")
    for key in _KEYS[kind][0]:
        if rope.value.get(key) is None:
            raise rope.wrong(key, f"but rope type {kind} requires it")
    return kind


def write_rope(
    model: ModelConfig,
    *,
    partial: bool = False,
    by_layer: bool = False,
    more: Mapping[str, str | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """Writes the entries of config.json that describe rotary embeddings.

    Args:
        model: the model.
        partial: the family can rotate a share of a head's channels.
        by_layer: the family stores one object for each kind of layer, because layers with a window
            have a base of their own.
        more: as in ``read_rope``.
    """
    scaling: dict[str, Any] = {"rope_type": model.rope_type}
    for key, field in {**more, **ROPE_KEYS[model.rope_type]}.items():
        value = getattr(model, field) if field else None
        value = model.original_length if key == _ORIGINAL else value
        if value is not None:
            scaling[key] = list(value) if isinstance(value, tuple) else value
    if model.rope_type == "longrope" and "factor" not in scaling:
        original = model.original_length or 1
        scaling["factor"] = (model.max_position_embeddings or original) / original
    share = {_PARTIAL: model.rotary_percent} if partial else {}
    parameters: dict[str, Any] = {**scaling, "rope_theta": model.rotary_base, **share}
    local = {}
    if by_layer:
        base = model.window_rotary_base or model.rotary_base
        unscaled = {"rope_type": "default", "rope_theta": base, **share}
        window = parameters if model.window_rotary_base is None else unscaled
        parameters = dict(zip(LAYER_KINDS, (parameters, window)))
        local = {"rope_local_base_freq": base}
    return {
        "rope_theta": model.rotary_base,
        **share,
        **local,
        "rope_scaling": scaling if model.rope_type != "default" else None,
        "rope_parameters": parameters,
    }
