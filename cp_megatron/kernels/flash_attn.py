"""The flash-attn packages: FlashAttention 2, 3 and 4. Only this file imports them.

Shapes as in ``interface.py``; the packages take them as they are. All three define windows alike
(``flash_window``). They differ in their modules and in the parameters of their functions:

    2   flash_attn.flash_attn_interface   fills dq, dk, dv; -1 is unlimited; from 2.6 on
    3   flash_attn_interface              fills dq, dk, dv; -1 is unlimited; Hopper; the package's
                                          ``hopper`` folder since the beta of February 2025
    4   flash_attn.cute.interface         returns dq, dk, dv; None is unlimited; Hopper, Blackwell;
                                          the package's ``cute`` folder since December 2025
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from cp_megatron.errors import ConfigError
from cp_megatron.kernels.interface import BackwardInputs, Kernel
from cp_megatron.kernels.segments import Lengths
from cp_megatron.kernels.select import TRAITS
from cp_megatron.kernels.windows import FlashKernel, FlashWindow

_CONSTANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "flash_attn_2": {"dropout_p": 0.0, "softcap": 0.0, "return_softmax": False},
        "flash_attn_3": {},
        "flash_attn_4": {"return_lse": True},
    }
)
"""The arguments of each generation that every call has; a softcap replaces or adds one."""
_JOINING = frozenset({"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "window_size_left"})
"""Parameters of functions that take several tiles. Those of generation 2 before 2.7, which have no
``window_size_left``, keep the lse in another layout."""


def load_flash_attention(name: str, *, deterministic: bool, softcap: float | None) -> Kernel:
    """Loads ``flash_attn_2``, ``flash_attn_3`` or ``flash_attn_4``.

    The arguments are those of ``FlashAttention``.

    Raises:
        ImportError: the package is not installed, or does not support this machine.
    """
    module = TRAITS[name].package
    assert module is not None
    interface = import_module(module)
    return FlashAttention(name, interface, deterministic=deterministic, softcap=softcap)


class FlashAttention(FlashKernel):
    """One generation of FlashAttention.

    Args:
        name: the name of the generation, e.g. ``flash_attn_2``.
        interface: its module, or a test double of it.
        deterministic: sum dQ (and dK, dV of grouped heads) in a fixed order.
        softcap: scores s become softcap * tanh(s / softcap); None leaves them as they are.

    Raises:
        ConfigError: the package is too old: the backward of generation 4 has no windows, or there
            is no softcap.
    """

    def __init__(
        self,
        name: str,
        interface: ModuleType | Any,
        *,
        deterministic: bool = False,
        softcap: float | None = None,
    ) -> None:
        self.name = name
        cap: Mapping[str, Any] = {} if softcap is None else {"softcap": softcap}
        self._constants = {**_CONSTANTS[name], **cap}
        self._is_newest = name == "flash_attn_4"
        forward, backward = ("fwd", "bwd") if self._is_newest else ("forward", "backward")
        self._forward_op = getattr(interface, f"_flash_attn_{forward}")
        self._backward_op = getattr(interface, f"_flash_attn_{backward}")
        self._many_ops: Sequence[Any] = (self._forward_op, self._backward_op)
        if name == "flash_attn_2":
            names = "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"
            self._many_ops = [getattr(interface, x, None) for x in names]
        self.joins = all(op and set(_parameters(op)) >= _JOINING for op in self._many_ops)
        self._deterministic = deterministic
        needed = {"window_size_left", "deterministic"}
        if self._is_newest and not needed <= set(_parameters(self._backward_op)):
            rule = "the installed package is too old: its backward has no windows"
            raise ConfigError("--kernel", name, rule, "pip install -U flash-attn-4")
        if cap and not self._has_softcap(interface):
            rule = "the installed package is too old: it has no exact softcap of the scores"
            raise ConfigError("--kernel", name, rule, f"{TRAITS[name].install}, a newer version")

    def _has_softcap(self, interface: ModuleType | Any) -> bool:
        # Before April 2026, generation 4 took the argument, but its formula was wrong and its
        # backward ignored it. The version that corrected both added this function.
        corrected = hasattr(getattr(interface, "utils", None), "create_softcap_scoremod_bwd")
        functions = self._forward_op, self._backward_op
        taken = all("softcap" in _parameters(function) for function in functions)
        return taken and (corrected or not self._is_newest)

    def call_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: FlashWindow,
        scale: float,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Tensor]:
        function = self._many_ops[0] if lengths else self._forward_op
        tensors = {"q": q, "k": k, "v": v}
        results = self._call(function, tensors, window, scale, lengths)
        # Generation 2 before 2.7 returns out, q, k, v, padded out, lse, debug mask, random state.
        return results[0], results[5 if len(results) == 8 else 1]

    def call_backward(
        self, x: BackwardInputs, window: FlashWindow, scale: float, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        function = self._many_ops[1] if lengths else self._backward_op
        tensors = {**x._asdict(), "softmax_lse": x.lse}
        if self._is_newest:  # returns the gradients
            dq, dk, dv, *_ = self._call(function, tensors, window, scale, lengths)
            return dq, dk, dv
        contiguous = torch.contiguous_format
        dq, dk, dv = (torch.empty_like(y, memory_format=contiguous) for y in (x.q, x.k, x.v))
        self._call(function, {**tensors, "dq": dq, "dk": dk, "dv": dv}, window, scale, lengths)
        return dq, dk, dv

    def _call(
        self,
        function: Any,
        tensors: Mapping[str, Tensor],
        window: FlashWindow,
        scale: float,
        lengths: Lengths | None,
    ) -> Any:
        """Passes what this version has parameters for, and None for other required parameters.

        The latter are caches, lengths, scales of fp8 and slopes.
        """
        unlimited = None if self._is_newest else -1
        left, right = (unlimited if bound < 0 else bound for bound in window[1:])
        known = {
            **tensors,
            **self._constants,
            "softmax_scale": scale,
            "causal": window.causal,
            "is_causal": window.causal,
            "window_size": (left, right),
            "window_size_left": left,
            "window_size_right": right,
            "deterministic": self._deterministic,
            **(_named(lengths) if lengths else {}),
        }
        parameters = _parameters(function).items()
        names = [name for name, required in parameters if required or name in known]
        return function(**{name: known.get(name) for name in names})


def _named(lengths: Lengths) -> dict[str, Any]:
    """The lengths by the names of the packages."""
    return {
        "cu_seqlens_q": lengths.q_edges,
        "cu_seqlens_k": lengths.k_edges,
        "max_seqlen_q": lengths.max_q,
        "max_seqlen_k": lengths.max_k,
    }


@cache
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
