"""Choosing the attention kernel, with a reason. This module does not import torch.

A kernel computes one tile (see ``plan/tiling.py``) and returns ``(out, lse)``; the partial results
of several tiles are merged by their lse. A table states what each backend supports, so that a flag
can be refused before torch is loaded and the start table can give the reason for the choice.

Kernels that need head dims to be multiples of 8 pad them. Value heads may be wider or narrower than
key heads under every kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import MappingProxyType
from typing import Any, NamedTuple

from cp_megatron.errors import ConfigError


@dataclass(frozen=True)
class KernelTraits:
    """The capabilities of one backend."""

    name: str
    max_head_dim: int  # for key heads and value heads
    summary: str
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[str, ...] = ("bfloat16",)
    wider_on: tuple[tuple[int, int], ...] = ()  # major compute capability, its larger max_head_dim
    deterministic_head_dim: int = 1 << 16  # largest with a deterministic backward; 0 means none
    windows: bool = True
    dropout: bool = False  # whether it has a dropout mask that does not depend on the layout
    softcap: bool = False  # whether it can bound the scores by softcap * tanh(score / softcap)
    capabilities: tuple[int, ...] = ()  # major compute capabilities; empty means all
    package: str | None = None  # the optional module that it needs
    install: str = ""  # how to install the package


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """The chosen kernel and the reason that is shown to the user."""

    name: str
    reason: str


class _Wanted(NamedTuple):
    device: str
    dtype: str
    head_dim: int
    attention_dropout: float
    softcap: float | None
    window: bool
    deterministic: bool
    capability: tuple[int, int] | None

    def order(self, *, repeats: bool) -> tuple[str, ...]:
        """The kernels to try; none if the device is unknown."""
        newer = self.capability is not None and self.capability[0] >= 9
        measured = self.head_dim <= 128  # cuDNN's backward of wider heads was never timed here
        place = "cuda, Hopper and later" if newer and repeats and measured else self.device
        return PREFERENCE.get(place, ())


_ALL_TYPES = ("float64", "float32", "bfloat16")
_ALL = (
    KernelTraits(
        *("reference", 1 << 16, "eager PyTorch, slow, quadratic memory, the oracle"),
        devices=("cpu", "cuda"),
        dtypes=_ALL_TYPES,
        dropout=True,
        softcap=True,
    ),
    KernelTraits(
        *("cpu", 512, "PyTorch's fused CPU flash attention"), devices=("cpu",), dtypes=_ALL_TYPES
    ),
    KernelTraits("cuda", 256, "PyTorch's fused CUDA flash attention"),
    KernelTraits(
        *("cudnn", 128, "cuDNN's fused attention; builds a plan for each shape of tile it meets"),
        wider_on=((9, 256),),
        deterministic_head_dim=0,
        windows=False,
    ),
    KernelTraits(
        *("flash_attn_2", 256, "the flash-attn package, FlashAttention 2"),
        softcap=True,
        package="flash_attn.flash_attn_interface",
        install="pip install -e '.[cuda]'",
    ),
    KernelTraits(
        *("flash_attn_3", 256, "the flash-attn package, FlashAttention 3"),
        deterministic_head_dim=192,
        capabilities=(9,),
        softcap=True,
        package="flash_attn_interface",
        install="pip install ./hopper in the flash-attention repository",
    ),
    KernelTraits(
        *("flash_attn_4", 128, "the flash-attn package, FlashAttention 4"),
        wider_on=((9, 256),),
        capabilities=(9, 10, 11),
        softcap=True,
        package="flash_attn.cute.interface",
        install="pip install flash-attn-4",
    ),
)

TRAITS: Mapping[str, KernelTraits] = MappingProxyType({traits.name: traits for traits in _ALL})
"""All backends by name. ``flash_attn`` is not among them, because it stands for a generation."""

FLASH_ATTENTION = ("flash_attn_4", "flash_attn_3", "flash_attn_2")
"""The generations that ``flash_attn`` stands for, newest first."""

# On Hopper, 3 comes before 4: it was written for that architecture and is more mature.
_HOPPER = ("flash_attn_3", "flash_attn_4", "flash_attn_2")

KERNEL_NAMES = ("reference", "cpu", "cuda", "cudnn", "flash_attn", *reversed(FLASH_ATTENTION))
"""The values of ``--kernel`` besides ``auto``."""

PREFERENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": ("cpu", "reference"),
        "cuda": ("flash_attn", "cuda", "reference"),
        "cuda, Hopper and later": (
            *("flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2", "cuda", "reference"),
        ),
    }
)
"""The kernels that ``auto`` tries, the fastest first. TFLOP/s forward / backward on a GPU of the
Hopper generation, one causal row of 32K tokens, 32 query and 8 key heads (``benchmarks/gpu.py``;
FlashAttention 3 as published, Shah et al. 2024, arXiv:2407.08608):

    head dim    flash_attn_3    cudnn         cuda and flash_attn_2
    64          473 / 474       465 / 406     304 / 277
    128         616 / 561       590 / 531     340 / 318

cuDNN builds a plan for every shape of tile, so that rows of changing documents take the order of
earlier GPUs.
"""


def select_kernel(
    name: str,
    *,
    device: str,
    dtype: str,
    head_dim: int,
    attention_dropout: float = 0.0,
    softcap: float | None = None,
    window: bool = False,
    deterministic: bool = False,
    capability: tuple[int, int] | None = None,
    repeats: bool = False,
) -> KernelChoice:
    """Chooses the attention kernel.

    Args:
        name: a kernel's name, or ``auto`` for the first one that supports the arguments.
        device: ``cpu`` or ``cuda``.
        dtype: the compute type, ``float64``, ``float32`` or ``bfloat16``.
        head_dim: the width of the wider one of key and value heads.
        attention_dropout: the probability with which attention weights are dropped.
        softcap: the scores s become softcap * tanh(s / softcap); None leaves them as they are.
        window: the mask has a sliding window.
        deterministic: the same inputs must give the same bits.
        capability: the CUDA device's compute capability (major, minor). If it is None, it is not
            known yet: no kernel is refused for it, and ``flash_attn`` is not resolved.
        repeats: all rows have the same tiles, because no documents are masked.

    Returns:
        The name and the reason; for ``flash_attn`` on a known device the name of the generation.

    Raises:
        ConfigError: the named kernel, or every kernel, lacks a feature.
    """
    wanted = _Wanted(
        *(device, dtype, head_dim, attention_dropout, softcap, window, deterministic, capability)
    )
    if name != "auto":
        if name not in KERNEL_NAMES:
            works = ", ".join(["auto", *KERNEL_NAMES])
            raise ConfigError("--kernel", name, "is not a kernel", works)
        taken, text = _try(name, wanted)
        if taken is None:
            raise _refusal(name, text, wanted)
        return KernelChoice(name=taken, reason=f"asked for: {text}")
    if not (order := wanted.order(repeats=repeats)):
        raise ConfigError("device", device, "has no attention kernel", "cpu or cuda")
    passed_over: list[str] = []
    for candidate in order:
        taken, text = _try(candidate, wanted)
        if taken is not None:
            return KernelChoice(name=taken, reason="; ".join([text, *passed_over]))
        passed_over.append(f"not {candidate}: {text}")
    raise _refusal(name, "; ".join(passed_over), wanted)


def candidates(**wanted: Any) -> list[str]:
    """The kernels that could be chosen, the one that ``auto`` takes first; without ``reference``
    unless no other fits, and without cuDNN, which plans every shape, unless rows look alike. The
    arguments are those of ``select_kernel`` without the name.

    Raises:
        ConfigError: no kernel fits.
    """
    found = [select_kernel("auto", **wanted).name]
    for name in TRAITS:
        if name not in (*found, "reference") and (name != "cudnn" or wanted.get("repeats")):
            with suppress(ConfigError):
                found.append(select_kernel(name, **wanted).name)
    return found  # in the same order on every rank


def _try(name: str, wanted: _Wanted) -> tuple[str | None, str]:
    """The kernel that ``name`` resolves to and its summary, or None and the problem."""
    if name != "flash_attn":
        problem = _problem(TRAITS[name], wanted)
        return (None, problem) if problem else (name, TRAITS[name].summary)
    on_hopper = wanted.capability and wanted.capability[0] == 9
    generations = [TRAITS[other] for other in (_HOPPER if on_hopper else FLASH_ATTENTION)]
    problems = {traits.name: _problem(traits, wanted) for traits in generations}
    able = [traits for traits in generations if not problems[traits.name]]
    if able and wanted.capability is None:
        return name, "the flash-attn package, the newest generation for the device"
    if able:
        return able[0].name, able[0].summary
    if wanted.device not in generations[0].devices:
        return None, problems[generations[0].name]
    present = [traits.name for traits in generations if is_installed(traits)]
    missing = "needs the package flash_attn, which is not installed"
    return None, "; ".join(f"{x} {problems[x]}" for x in present) or missing


def _refusal(name: str, problem: str, wanted: _Wanted) -> ConfigError:
    others = [x for x in KERNEL_NAMES[:5] if x != name and _try(x, wanted)[0] is not None]
    works = [f"--kernel {other}" for other in ["auto", *others]] if others else []
    if wanted.attention_dropout and "dropout" in problem:
        works.append("--attention-dropout 0")
    if "not installed" in problem:
        works.append(TRAITS[name if name in TRAITS else "flash_attn_2"].install)
    return ConfigError("--kernel", name, problem, " or ".join(works))


def _problem(traits: KernelTraits, wanted: _Wanted) -> str:
    """The requirement that this backend does not meet; empty if it meets all."""
    if wanted.device not in traits.devices:
        return f"runs on {' or '.join(traits.devices)}, not on {wanted.device}"
    if not is_installed(traits):
        return f"needs the package {traits.package}, which is not installed"
    if wanted.dtype not in traits.dtypes:
        return f"computes in {', '.join(traits.dtypes)}, not in {wanted.dtype}"
    major = wanted.capability[0] if wanted.capability else 0
    if major and traits.capabilities and major not in traits.capabilities:
        majors = " or ".join(map(str, traits.capabilities))
        dotted = ".".join(map(str, wanted.capability or ()))
        return f"needs compute capability {majors}, the device has {dotted}"
    largest = dict(traits.wider_on).get(major, traits.max_head_dim)
    if wanted.head_dim > largest:
        return f"head dim {wanted.head_dim} is above its largest, {largest}"
    if wanted.window and not traits.windows:
        return "has no sliding windows"
    if wanted.attention_dropout and not traits.dropout:
        return "has no attention dropout that is the same on every layout and number of ranks"
    if wanted.softcap is not None and not traits.softcap:
        return "has no softcap of the scores"
    if wanted.deterministic and not traits.deterministic_head_dim:
        return "its backward is not deterministic"
    if wanted.deterministic and wanted.head_dim > traits.deterministic_head_dim:
        return f"is deterministic up to head dim {traits.deterministic_head_dim} only"
    return ""


def is_installed(traits: KernelTraits) -> bool:
    """Whether its module can be found. It is not imported, which would load torch and CUDA."""
    if traits.package is None:
        return True
    first, *rest = traits.package.split(".")
    spec = importlib.util.find_spec(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec is not None
