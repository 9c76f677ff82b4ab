"""Reads Megatron-LM's lists of layers, such as ``([0]*3+[1]*58)``, as the numbers of layers."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

from cp_megatron.errors import ConfigError

LAYER_FLAGS: Mapping[str, str] = {
    "--moe-layer-freq": "--moe-layers",
    "--linear-attention-freq": "--linear-attention-layers",
}
"""The flags that may have such a list, and the flag that names the layers of its ones."""
_LETTERS = re.compile(r"[\d,+*()\[\]]{1,1000}")
_MOST_LAYERS = 10_000


def layers_of_pattern(flag: str, pattern: str, num_layers: Sequence[str] | None) -> list[str]:
    """The numbers of the layers, from 0, whose entry in the list is 1.

    Args:
        flag: the flag that the list follows.
        pattern: a Python expression of lists of 0 and 1, with ``+`` and ``*``.
        num_layers: the words after ``--num-layers``; None if the command line does not have it.

    Raises:
        ConfigError: it is no such list, or its length is not the number of layers.
    """
    entries = None
    if _LETTERS.fullmatch(pattern):
        try:
            entries = _value(ast.parse(pattern, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            entries = None
    if not isinstance(entries, list) or not set(entries) <= {0, 1}:
        raise ConfigError(flag, pattern, "is no list of 0 and 1", "([0]*3+[1]*58)")
    if num_layers is None:
        rule = "needs the number of layers beside it"
        raise ConfigError(flag, pattern, rule, f"--num-layers {len(entries)} with it")
    if [str(len(entries))] != list(num_layers):
        rule = f"has {len(entries)} entries, but must have one for each layer"
        raise ConfigError(flag, pattern, rule, f"--num-layers {len(entries)}")
    layers = [str(layer) for layer, entry in enumerate(entries) if entry]
    if not layers:
        raise ConfigError(flag, pattern, "names no layer", "leave the flag out")
    return layers


def _value(node: ast.expr) -> int | list[int]:
    """The value of an expression of numbers and of lists of numbers.

    Raises:
        ValueError: it is another expression, or too long.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return _checked(node.value)
    if isinstance(node, ast.List):
        return [_number(_value(entry)) for entry in node.elts]
    if not isinstance(node, ast.BinOp):
        raise ValueError
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add):
        if isinstance(left, list) and isinstance(right, list):
            return _checked(left + right)
        return _checked(_number(left) + _number(right))
    if not isinstance(node.op, ast.Mult):
        raise ValueError
    if isinstance(right, list):
        left, right = right, left
    count = _number(right)
    if isinstance(left, int):
        return _checked(left * count)
    if len(left) * count > _MOST_LAYERS:
        raise ValueError
    return left * count


def _number(value: int | list[int]) -> int:
    if isinstance(value, list):
        raise ValueError
    return value


def _checked(value: int | list[int]) -> int | list[int]:
    if (len(value) if isinstance(value, list) else value) > _MOST_LAYERS:
        raise ValueError
    return value
