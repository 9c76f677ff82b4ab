"""The flash-attn packages: FlashAttention 2, 3 and 4. The only file that imports them.

Shapes as in ``interface.py``; the packages take them as they are. The three share their meaning of
a window (``bottom_right_window``) and differ in where they live and what their calls look like:

    2   flash_attn.flash_attn_interface   fills dq, dk, dv; -1 is no bound
    3   flash_attn_interface              fills dq, dk, dv; -1 is no bound; Hopper
    4   flash_attn.cute.interface         returns dq, dk, dv; None is no bound; Hopper, Blackwell
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from cp_megatron.errors import ConfigError
from cp_megatron.kernels.interface import BackwardInputs, Kernel, cut, same_width
from cp_megatron.kernels.windows import bottom_right_window
from cp_megatron.plan.tiling import Band


class _FlashAttention(ABC):
    """What the generations share: types, widths, and the shape of the two calls."""

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The package computes in the inputs' type and accumulates in float32 inside."""
        return dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel.forward``; out comes in the inputs' type."""
        v_dim = v.shape[-1]
        q, k, v = same_width(q, k, v, multiple=8)
        out, lse = self._call_forward(q, k, v, band, scale)
        return cut(out, v_dim), lse

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Kernel.backward``."""
        wide = x.same_width(multiple=8)._replace(lse=x.lse.contiguous())
        return x.cut(*self._call_backward(wide, band, scale))

    @abstractmethod
    def _call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [B, Q, H, E] and lse [B, H, Q]; widths are equal and multiples of 8."""

    @abstractmethod
    def _call_backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv; widths are equal and multiples of 8, lse is contiguous."""


class FlashAttention2(_FlashAttention):
    """FlashAttention 2, from 2.6 on.

    Args:
        interface: the module ``flash_attn.flash_attn_interface``, or a double of it.
        deterministic: sum dQ in a fixed order.
    """

    def __init__(self, interface: ModuleType | Any, *, deterministic: bool = False) -> None:
        self._forward = interface._flash_attn_forward
        self._backward = interface._flash_attn_backward
        self._deterministic = deterministic
        self._parameters = _parameters(self._forward)

    def _call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        results = self._forward(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=scale,
            **_mask(self._parameters, band, q, k),
            alibi_slopes=None,
            return_softmax=False,
            softcap=0.0,
        )
        # Since 2.7: out, lse, debug mask, random state; before: out, q, k, v, out padded, lse, ...
        return results[0], results[1 if len(results) == 4 else 5]

    def _call_backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = _empty_like(x)
        self._backward(
            *x,
            *grads,
            dropout_p=0.0,
            softmax_scale=scale,
            **_mask(self._parameters, band, x.q, x.k),
            alibi_slopes=None,
            deterministic=self._deterministic,
            softcap=0.0,
        )
        return grads


class FlashAttention3(_FlashAttention):
    """FlashAttention 3, the package's ``hopper`` folder, since the beta of February 2025.

    Args:
        interface: the module ``flash_attn_interface``, or a double of it.
        deterministic: sum dQ (and dK, dV of grouped heads) in a fixed order.
    """

    def __init__(self, interface: ModuleType | Any, *, deterministic: bool = False) -> None:
        self._forward = interface._flash_attn_forward
        self._backward = interface._flash_attn_backward
        self._deterministic = deterministic
        self._forward_parameters = _parameters(self._forward)
        self._backward_parameters = _parameters(self._backward)

    def _call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        given = {
            "q": q,
            "k": k,
            "v": v,
            "softmax_scale": scale,
            **_mask(self._forward_parameters, band, q, k),
        }
        out, lse, *_ = self._forward(**_filled(self._forward_parameters, given))
        return out, lse

    def _call_backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _empty_like(x)
        given = {
            "dout": x.dout,
            "q": x.q,
            "k": x.k,
            "v": x.v,
            "out": x.out,
            "softmax_lse": x.lse,
            "dq": dq,
            "dk": dk,
            "dv": dv,
            "softmax_scale": scale,
            "deterministic": self._deterministic,
            **_mask(self._backward_parameters, band, x.q, x.k),
        }
        self._backward(**_filled(self._backward_parameters, given))
        return dq, dk, dv


class FlashAttention4(_FlashAttention):
    """FlashAttention 4, the package's ``cute`` folder, since December 2025.

    Args:
        interface: the module ``flash_attn.cute.interface``, or a double of it.
        deterministic: sum dQ (and dK, dV of grouped heads) in a fixed order.

    Raises:
        ConfigError: the package is older: its backward knows no windows.
    """

    def __init__(self, interface: ModuleType | Any, *, deterministic: bool = False) -> None:
        self._forward = interface._flash_attn_fwd
        self._backward = interface._flash_attn_bwd
        self._deterministic = deterministic
        if not {"window_size_left", "deterministic"} <= set(_parameters(self._backward)):
            rule = "the installed package is too old: its backward has no windows"
            raise ConfigError("--kernel", "flash_attn_4", rule, "pip install -U flash-attn-4")

    def _call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        # Two results at first, four by now.
        out, lse, *_ = self._forward(
            q, k, v, softmax_scale=scale, return_lse=True, **self._mask(band, q, k)
        )
        return out, lse

    def _call_backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Here the operands come first and dout after out.
        dq, dk, dv, *_ = self._backward(
            *(x.q, x.k, x.v, x.out, x.dout, x.lse),
            softmax_scale=scale,
            deterministic=self._deterministic,
            **self._mask(band, x.q, x.k),
        )
        return dq, dk, dv

    def _mask(self, band: Band, q: Tensor, k: Tensor) -> dict[str, Any]:
        causal, left, right = _causal_and_window(band, q, k)
        return {
            "causal": causal,
            "window_size_left": None if left < 0 else left,
            "window_size_right": None if right < 0 else right,
        }


_GENERATIONS: Mapping[str, type[FlashAttention2 | FlashAttention3 | FlashAttention4]] = (
    MappingProxyType(
        {
            "flash_attn_2": FlashAttention2,
            "flash_attn_3": FlashAttention3,
            "flash_attn_4": FlashAttention4,
        }
    )
)


def load_flash_attention(name: str, *, deterministic: bool) -> Kernel:
    """``flash_attn_2``, ``flash_attn_3`` or ``flash_attn_4``.

    Raises:
        ImportError: the package is not installed, or not for this machine.
    """
    if name == "flash_attn_2":
        interface = import_module("flash_attn.flash_attn_interface")
    elif name == "flash_attn_3":
        interface = import_module("flash_attn_interface")
    else:
        interface = import_module("flash_attn.cute.interface")
    return _GENERATIONS[name](interface, deterministic=deterministic)


def _parameters(function: Any) -> dict[str, bool]:
    """The function's parameters by name, and whether they must be given.

    Functions registered as PyTorch operators show ``inspect`` nothing but ``*args, **kwargs``; what
    they take stands in the operator's schema.
    """
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        return {a.name: not a.has_default_value() for a in operator._schema.arguments}
    signature = inspect.signature(function).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in signature}


def _filled(parameters: Mapping[str, bool], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` and None for whatever else must be given: caches, lengths, scales of fp8."""
    missing = [name for name, required in parameters.items() if required and name not in given]
    return {**given, **dict.fromkeys(missing)}


def _mask(parameters: Mapping[str, bool], band: Band, q: Tensor, k: Tensor) -> dict[str, Any]:
    """The mask's arguments as this version of generation 2 or 3 calls them."""
    causal, left, right = _causal_and_window(band, q, k)
    flag = {"is_causal" if "is_causal" in parameters else "causal": causal}
    if "window_size" in parameters:
        return {**flag, "window_size": (left, right)}
    return {**flag, "window_size_left": left, "window_size_right": right}


def _causal_and_window(band: Band, q: Tensor, k: Tensor) -> tuple[bool, int, int]:
    """causal, left and right as every generation understands them, -1 for no bound."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    left, right = bottom_right_window(band, num_queries, num_keys)
    # The flag means the last corner's diagonal; off a square the window alone says it.
    return band.is_causal and num_queries == num_keys, left, right


def _empty_like(x: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Where the package writes dq, dk and dv."""
    dq, dk, dv = (
        torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.q, x.k, x.v)
    )
    return dq, dk, dv
