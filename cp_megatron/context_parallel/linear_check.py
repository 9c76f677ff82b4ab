"""Checks of the inputs of linear attention and of short convolutions.

Shapes: B batch, S tokens of the shard, G key heads, H value heads, D key dim, E value dim, c
channels, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cp_megatron.errors import ConfigError


def check_linear(inputs: Sequence[Tensor], num_tokens: int) -> None:
    """Refuses inputs that do not fit each other or the layout.

    Args:
        inputs: q and k [B, S, G, D], v [B, S, H, E], g [B, S, H] or [B, S, H, D], and beta
            [B, S, H] if there is one.
        num_tokens: S of this rank.

    Raises:
        ConfigError: a shape, type or device that does not fit.
    """
    q, k, v, g, *rest = inputs
    names = "q", "k", "v", "g", "beta"
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, inputs))
    rule = ""
    if not q.ndim == v.ndim == 4 or q.shape != k.shape:
        rule = "q and k must be [batch, tokens, key heads, dim], v [batch, tokens, heads, dim]"
    elif q.shape[1] != num_tokens:
        rule = f"tokens must be this rank's {num_tokens}"
    elif q.shape[:2] != v.shape[:2] or 0 in (*q.shape, *v.shape) or v.shape[2] % q.shape[2]:
        rule = "heads of v must be a multiple of those of q, of the same tokens"
    elif g.shape not in (v.shape[:3], (*v.shape[:3], q.shape[3])):
        rule = "g must be [batch, tokens, heads], or one number per channel of the key"
    elif any(x.shape != v.shape[:3] for x in rest):
        rule = "beta must be [batch, tokens, heads]"
    if rule:
        raise ConfigError("linear_attention", shapes, rule)
    if not q.dtype == k.dtype == v.dtype or not all(x.is_floating_point() for x in inputs):
        types = ", ".join(f"{name} {x.dtype}" for name, x in zip(names, inputs))
        raise ConfigError("linear_attention", types, "q, k and v must be of one floating type")
    _check_devices("linear_attention", inputs)


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, num_tokens: int) -> None:
    """Refuses x [B, S, c], weight [c, W] and bias [c] that do not fit each other or the layout.

    Raises:
        ConfigError: a shape, type or device that does not fit.
    """
    given = [x, weight] if bias is None else [x, weight, bias]
    shapes = ", ".join(f"{n} {tuple(y.shape)}" for n, y in zip(("x", "weight", "bias"), given))
    rule = ""
    if x.ndim != 3 or x.shape[1] != num_tokens:
        rule = f"x must be [batch, {num_tokens} tokens of this rank, channels]"
    elif weight.ndim != 2 or weight.shape[0] != x.shape[2] or not weight.shape[1]:
        rule = "weight must be [channels, width]"
    elif bias is not None and bias.shape != x.shape[2:]:
        rule = "bias must be [channels]"
    if rule:
        raise ConfigError("short_conv", shapes, rule)
    if len({y.dtype for y in given}) > 1 or not x.is_floating_point():
        types = ", ".join(str(y.dtype) for y in given)
        raise ConfigError("short_conv", types, "must be one floating type")
    _check_devices("short_conv", given)


def _check_devices(name: str, tensors: Sequence[Tensor]) -> None:
    if len({x.device for x in tensors}) > 1:
        devices = ", ".join(str(x.device) for x in tensors)
        raise ConfigError(name, devices, "must be on one device")
