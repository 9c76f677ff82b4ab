"""The flash-attn packages: FlashAttention 2, 3 and 4. Only this file imports them.

Shapes as in ``interface.py``; the packages take them as they are. All three define windows alike
(``flash_window``). They differ in their modules and in the arguments of their functions:

    2   flash_attn.flash_attn_interface   fills dq, dk, dv; -1 is unlimited
    3   flash_attn_interface              fills dq, dk, dv; -1 is unlimited; Hopper
    4   flash_attn.cute.interface         returns dq, dk, dv; None is unlimited; Hopper, Blackwell
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from cp_megatron.errors import ConfigError
from cp_megatron.kernels.interface import BackwardInputs, Kernel
from cp_megatron.kernels.select import TRAITS
from cp_megatron.kernels.windows import FlashKernel, FlashWindow


class FlashAttention2(FlashKernel):
    """FlashAttention 2, from 2.6 on.

    Args:
        interface: the module ``flash_attn.flash_attn_interface``, or a test double of it.
        deterministic: sum dQ in a fixed order.
    """

    def __init__(self, interface: ModuleType | Any, *, deterministic: bool = False) -> None:
        self._forward_op = interface._flash_attn_forward
        self._backward_op = interface._flash_attn_backward
        self._deterministic = deterministic
        self._parameters = _parameters(self._forward_op)

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: FlashWindow, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel.call_forward``."""
        results = self._forward_op(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=scale,
            **_mask(self._parameters, window),
            alibi_slopes=None,
            return_softmax=False,
            softcap=0.0,
        )
        # Since 2.7: out, lse, debug mask, random state; before: out, q, k, v, out padded, lse, ...
        return results[0], results[1 if len(results) == 4 else 5]

    def call_backward(
        self, x: BackwardInputs, window: FlashWindow, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashKernel.call_backward``."""
        grads = _empty_like(x)
        self._backward_op(
            *x,
            *grads,
            dropout_p=0.0,
            softmax_scale=scale,
            **_mask(self._parameters, window),
            alibi_slopes=None,
            deterministic=self._deterministic,
            softcap=0.0,
        )
        return grads


class FlashAttention3(FlashKernel):
    """FlashAttention 3, the package's ``hopper`` folder, since the beta of February 2025.

    Args:
        interface: the module ``flash_attn_interface``, or a test double of it.
        deterministic: sum dQ (and dK, dV of grouped heads) in a fixed order.
    """

    def __init__(self, interface: ModuleType | Any, *, deterministic: bool = False) -> None:
        self._forward_op = interface._flash_attn_forward
        self._backward_op = interface._flash_attn_backward
        self._deterministic = deterministic
        self._forward_parameters = _parameters(self._forward_op)
        self._backward_parameters = _parameters(self._backward_op)

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: FlashWindow, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel.call_forward``."""
        given = {
            "q": q,
            "k": k,
            "v": v,
            "softmax_scale": scale,
            **_mask(self._forward_parameters, window),
        }
        out, lse, *_ = self._forward_op(**_filled(self._forward_parameters, given))
        return out, lse

    def call_backward(
        self, x: BackwardInputs, window: FlashWindow, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashKernel.call_backward``."""
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
            **_mask(self._backward_parameters, window),
        }
        self._backward_op(**_filled(self._backward_parameters, given))
        return dq, dk, dv


class FlashAttention4(FlashKernel):
    """FlashAttention 4, the package's ``cute`` folder, since December 2025.

    Args:
        interface: the module ``flash_attn.cute.interface``, or a test double of it.
        deterministic: sum dQ (and dK, dV of grouped heads) in a fixed order.

    Raises:
        ConfigError: the package is too old, because its backward has no windows.
    """

    def __init__(self, interface: ModuleType | Any, *, deterministic: bool = False) -> None:
        self._forward_op = interface._flash_attn_fwd
        self._backward_op = interface._flash_attn_bwd
        self._deterministic = deterministic
        if not {"window_size_left", "deterministic"} <= set(_parameters(self._backward_op)):
            rule = "the installed package is too old: its backward has no windows"
            raise ConfigError("--kernel", "flash_attn_4", rule, "pip install -U flash-attn-4")

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: FlashWindow, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel.call_forward``."""
        # Early versions return two results, later ones four.
        out, lse, *_ = self._forward_op(
            q, k, v, softmax_scale=scale, return_lse=True, **self._mask(window)
        )
        return out, lse

    def call_backward(
        self, x: BackwardInputs, window: FlashWindow, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashKernel.call_backward``."""
        # Here the operands come first, and dout follows out.
        dq, dk, dv, *_ = self._backward_op(
            *(x.q, x.k, x.v, x.out, x.dout, x.lse),
            softmax_scale=scale,
            deterministic=self._deterministic,
            **self._mask(window),
        )
        return dq, dk, dv

    def _mask(self, window: FlashWindow) -> dict[str, Any]:
        causal, left, right = window
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
    """Loads ``flash_attn_2``, ``flash_attn_3`` or ``flash_attn_4``.

    Raises:
        ImportError: the package is not installed, or does not support this machine.
    """
    module = TRAITS[name].package
    assert module is not None
    return _GENERATIONS[name](import_module(module), deterministic=deterministic)


def _parameters(function: Any) -> dict[str, bool]:
    """The function's parameters by name, and whether each is required.

    For functions that are registered as PyTorch operators, ``inspect`` sees only ``*args`` and
    ``**kwargs``; their parameters are in the operator's schema.
    """
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        return {a.name: not a.has_default_value() for a in operator._schema.arguments}
    signature = inspect.signature(function).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in signature}


def _filled(parameters: Mapping[str, bool], given: Mapping[str, Any]) -> dict[str, Any]:
    """Adds None for all other required parameters: caches, lengths, scales of fp8."""
    missing = [name for name, required in parameters.items() if required and name not in given]
    return {**given, **dict.fromkeys(missing)}


def _mask(parameters: Mapping[str, bool], window: FlashWindow) -> dict[str, Any]:
    """The mask's arguments under the names of this version of generation 2 or 3."""
    flag = {"is_causal" if "is_causal" in parameters else "causal": window.causal}
    if "window_size" in parameters:
        return {**flag, "window_size": (window.left, window.right)}
    return {**flag, "window_size_left": window.left, "window_size_right": window.right}


def _empty_like(x: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates dq, dk and dv for the package to fill."""
    dq, dk, dv = (
        torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.q, x.k, x.v)
    )
    return dq, dk, dv
