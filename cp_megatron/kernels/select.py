"""Which attention kernel runs, and why. A table and one function; no torch.

A kernel computes one tile (see ``plan/tiles.py``) and returns ``(out, lse)``; partial results of
several tiles are merged by their lse. What each backend can do is stated here once, so that a
flag can be refused before torch is loaded and the start table can say why a kernel was taken.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KernelTraits:
    """What one backend can do."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    max_head_dim: int
    head_dim_multiple: int = 1
    dropout: bool = False
    package: str | None = None
    """The optional package it needs."""
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """The kernel taken and the reason a user reads."""

    name: str
    reason: str


_ALL = (
    KernelTraits(
        name="reference",
        devices=("cpu", "cuda"),
        dtypes=("float64", "float32", "bfloat16"),
        max_head_dim=1 << 16,
        summary="eager PyTorch, quadratic memory, the oracle",
    ),
    KernelTraits(
        name="cpu",
        devices=("cpu",),
        dtypes=("float64", "float32", "bfloat16"),
        max_head_dim=512,
        summary="PyTorch's fused CPU flash attention",
    ),
    KernelTraits(
        name="cuda",
        devices=("cuda",),
        dtypes=("bfloat16",),
        max_head_dim=256,
        head_dim_multiple=8,
        summary="PyTorch's fused CUDA flash attention",
    ),
    KernelTraits(
        name="flash_attn",
        devices=("cuda",),
        dtypes=("bfloat16",),
        max_head_dim=256,
        head_dim_multiple=8,
        package="flash_attn",
        summary="the flash-attn package",
    ),
)

TRAITS: Mapping[str, KernelTraits] = MappingProxyType({traits.name: traits for traits in _ALL})
"""Every backend by name."""

# What "auto" tries on a device, in order.
_PREFERENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("cpu", "reference"), "cuda": ("flash_attn", "cuda", "reference")}
)


def select_kernel(
    name: str,
    *,
    device: str,
    dtype: str,
    head_dim: int,
    attention_dropout: float = 0.0,
) -> KernelChoice:
    """Chooses the attention kernel.

    Args:
        name: a kernel's name, or ``auto`` for the first that can do what is asked.
        device: ``cpu`` or ``cuda``.
        dtype: the compute type, ``float64``, ``float32`` or ``bfloat16``.
        head_dim: width of a head.
        attention_dropout: probability with which attention weights are dropped.

    Raises:
        ConfigError: the named kernel can not do this, or none can.
    """
    problem_of = partial(
        _problem,
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        attention_dropout=attention_dropout,
    )
    if name != "auto":
        if name not in TRAITS:
            raise ConfigError("--kernel", name, "is no kernel", ", ".join(["auto", *TRAITS]))
        problem = problem_of(TRAITS[name])
        if problem:
            others = [other for other in TRAITS if not problem_of(TRAITS[other])]
            raise _refusal(name, problem, others, attention_dropout)
        return KernelChoice(name=name, reason=f"asked for: {TRAITS[name].summary}")
    if device not in _PREFERENCE:
        raise ConfigError("device", device, "has no attention kernel", ", ".join(_PREFERENCE))
    passed_over: list[str] = []
    for candidate in _PREFERENCE[device]:
        problem = problem_of(TRAITS[candidate])
        if not problem:
            why = "".join(f"; {text}" for text in passed_over)
            return KernelChoice(name=candidate, reason=f"{TRAITS[candidate].summary}{why}")
        passed_over.append(f"not {candidate}: {problem}")
    raise _refusal(name, "; ".join(passed_over), [], attention_dropout)


def _refusal(name: str, problem: str, others: list[str], dropout: float) -> ConfigError:
    """The error naming what works instead."""
    works = [f"--kernel {other}" for other in ["auto", *others]] if others else []
    if dropout and "dropout" in problem:
        works.append("--attention-dropout 0")
    if "install" in problem:
        works.append("pip install -e '.[cuda]'")
    return ConfigError("--kernel", name, problem, " or ".join(works))


def _problem(
    traits: KernelTraits, *, device: str, dtype: str, head_dim: int, attention_dropout: float
) -> str:
    """Why this backend can not do it; empty when it can."""
    if device not in traits.devices:
        return f"runs on {' or '.join(traits.devices)}, not on {device}"
    if traits.package and importlib.util.find_spec(traits.package) is None:
        return f"needs the package {traits.package}, which is not installed"
    if dtype not in traits.dtypes:
        return f"computes in {', '.join(traits.dtypes)}, not in {dtype}"
    if head_dim > traits.max_head_dim:
        return f"head dim {head_dim} is above its largest, {traits.max_head_dim}"
    if head_dim % traits.head_dim_multiple:
        return f"head dim {head_dim} must be a multiple of {traits.head_dim_multiple}"
    if attention_dropout and not traits.dropout:
        return "has no attention dropout"
    return ""
