"""Ways to damage a file: its bytes, the JSON in it, the header of a safetensors file."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

Place = tuple[str | int, ...]
"""A path in a JSON document: keys and list indices."""

_HUGE = (*(2**k + d for k in (31, 32, 40, 62, 63, 64) for d in (-1, 0)), 10**30, 10**4000)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), *_HUGE),
    *("", "x", "../x", "/etc/passwd", "..", "a\0b", "\udcff", "rank-00001.safetensors", "F32"),
    *("I64", "float64", "int8", "model.row", "x" * 10_000, [], {}, [[]], [0], [1, -1], {"": ""}),
)


def harm_bytes(rng: Random, data: bytes) -> bytes:
    """Flips bits, truncates, extends, overwrites, deletes or repeats; never the same bytes."""
    while (damaged := _damaged(rng, data)) == data:
        pass
    return damaged


def _damaged(rng: Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    # Formats describe the rest of the file at its beginning.
    start = start % 64 if rng.random() < 0.4 else start
    stop = min(len(data), start + rng.choice([1, 2, 4, 8, 100]))
    match rng.randrange(8):
        case 0:
            return data[:start]
        case 1:
            return data + rng.choice([b"\0", b"{}", data, rng.randbytes(9)])
        case 2:
            return data[:start] + bytes(stop - start) + data[stop:]
        case 3:
            return data[:start] + b"\xff" * (stop - start) + data[stop:]
        case 4:
            return data[:start] + struct.pack("<Q", rng.choice(_HUGE[:12]) % 2**64) + data[stop:]
        case 5:
            return data[:start] + data[stop:]
        case 6:
            return data[:start] + data[start:stop] * 2 + data[stop:]
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        flipped[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def harm_json(rng: Random, document: Any) -> tuple[Any, Place]:
    """A changed copy and the path of the change. The copy can equal the document."""
    damaged = copy.deepcopy(document)
    places = list(_places(damaged))
    place = rng.choice(places)
    if rng.random() < 0.5:  # most paths are deep, and few of those differ
        depth = rng.randint(1, len(place))
        place = place[:depth]
    parent, key = _at(damaged, place[:-1]), place[-1]
    match rng.randrange(6):
        case 0:
            del parent[key]
        case 1:
            parent[key] = copy.deepcopy(_at(damaged, rng.choice(places)))
        case 2 if isinstance(parent, dict):
            parent[rng.choice(["", "../x", "rank-00009.safetensors", "x"])] = parent.pop(key)
        case 3 if isinstance(parent[key], int | float):
            parent[key] = rng.choice([parent[key] + 1, -parent[key], parent[key] * 2, 0])
        case 4:
            for _ in range(rng.choice([1, 900])):
                parent[key] = [parent[key]]
        case _:
            parent[key] = copy.deepcopy(rng.choice(_VALUES))
    return damaged, place


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield (*place, key)
        yield from _places(inner, (*place, key))


def _at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def sealed(fields: Any) -> bytes:
    """A ``manifest.json`` of these fields, with the SHA-256 that matches them."""
    text = _dumped(fields, sort_keys=True)
    digest = hashlib.sha256(text).hexdigest()
    return _dumped({"manifest": fields, "sha256": digest})


def _dumped(value: Any, *, sort_keys: bool = False) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), sort_keys=sort_keys).encode()
    except ValueError:  # a number of thousands of digits
        return b"[" + b"9" * 5000 + b"]"


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def forged_header(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    """A header that fits the file but describes its tensors differently."""
    forged = copy.deepcopy(header)
    keys = sorted(forged.keys() - {"__metadata__"})
    key = rng.choice(keys)
    match rng.randrange(4):
        case 0:
            other = rng.choice(keys)
            forged[key], forged[other] = forged[other], forged[key]
        case 1:
            others = {"F32": "I32", "F64": "I64", "I64": "F64"}
            forged[key]["dtype"] = others.get(forged[key]["dtype"], "U8")
        case 2:
            shape = forged[key]["shape"]
            forged[key]["shape"] = rng.choice([shape[::-1], [1, *shape], [*shape, 1], shape[1:]])
        case 3:
            forged[rng.choice(["x", "model.x", "../x"])] = forged.pop(key)
    return forged


def with_header(header: Any, rest: bytes) -> bytes:
    """A safetensors file with this header."""
    text = _dumped(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest
