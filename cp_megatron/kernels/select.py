"""Which attention kernel runs, and why. A table and one function; no torch.

A kernel computes one tile (see ``plan/tiling.py``) and returns ``(out, lse)``; partial results of
several tiles are merged by their lse. What each backend can do is stated here once, so that a
flag can be refused before torch is loaded and the start table can say why a kernel was taken.

Head dims that are no multiple of 8 are padded by the kernels that need one; value heads may be
wider or narrower than key heads everywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import MappingProxyType

from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KernelTraits:
    """What one backend can do."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    max_head_dim: int
    """Of key and value heads."""
    wider_on: tuple[tuple[int, int], ...] = ()
    """(major compute capability, its larger ``max_head_dim``)."""
    deterministic_head_dim: int = 1 << 16
    """Above this its backward is not deterministic; 0: it never is."""
    windows: bool = True
    dropout: bool = False
    """With a mask that does not depend on the layout."""
    capabilities: tuple[int, ...] = ()
    """Major compute capabilities it runs on; empty: any."""
    package: str | None = None
    """The optional module it needs."""
    install: str = ""
    """How to get the package."""
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """The kernel taken and the reason a user reads."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What is asked of a kernel; the arguments of ``select_kernel``."""

    device: str
    dtype: str
    head_dim: int
    attention_dropout: float
    window: bool
    deterministic: bool
    capability: tuple[int, int] | None


_ALL = (
    KernelTraits(
        name="reference",
        devices=("cpu", "cuda"),
        dtypes=("float64", "float32", "bfloat16"),
        max_head_dim=1 << 16,
        dropout=True,
        summary="eager PyTorch, slow, quadratic memory, the oracle",
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
        summary="PyTorch's fused CUDA flash attention",
    ),
    KernelTraits(
        name="cudnn",
        devices=("cuda",),
        dtypes=("bfloat16",),
        max_head_dim=128,
        wider_on=((9, 256),),
        deterministic_head_dim=0,
        windows=False,
        summary="cuDNN's fused attention; builds a plan for each shape of tile it meets",
    ),
    KernelTraits(
        name="flash_attn_2",
        devices=("cuda",),
        dtypes=("bfloat16",),
        max_head_dim=256,
        package="flash_attn.flash_attn_interface",
        install="pip install -e '.[cuda]'",
        summary="the flash-attn package, FlashAttention 2",
    ),
    KernelTraits(
        name="flash_attn_3",
        devices=("cuda",),
        dtypes=("bfloat16",),
        max_head_dim=256,
        deterministic_head_dim=192,
        capabilities=(9,),
        package="flash_attn_interface",
        install="pip install ./hopper in the flash-attention repository",
        summary="the flash-attn package, FlashAttention 3",
    ),
    KernelTraits(
        name="flash_attn_4",
        devices=("cuda",),
        dtypes=("bfloat16",),
        max_head_dim=128,
        wider_on=((9, 256),),
        capabilities=(9, 10, 11),
        package="flash_attn.cute.interface",
        install="pip install flash-attn-4",
        summary="the flash-attn package, FlashAttention 4",
    ),
)

TRAITS: Mapping[str, KernelTraits] = MappingProxyType({traits.name: traits for traits in _ALL})
"""Every backend by name. ``flash_attn`` is none of its own: it stands for a generation."""

FLASH_ATTENTION = ("flash_attn_4", "flash_attn_3", "flash_attn_2")
"""What ``flash_attn`` stands for, newest first."""

# 3 before 4 on Hopper: it was written for it and is the older code.
_HOPPER = ("flash_attn_3", "flash_attn_4", "flash_attn_2")

KERNEL_NAMES = ("reference", "cpu", "cuda", "cudnn", "flash_attn", *reversed(FLASH_ATTENTION))
"""What ``--kernel`` takes besides ``auto``."""

# What "auto" tries on a device, in order. Not cudnn: packed rows have too many shapes for it.
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
    window: bool = False,
    deterministic: bool = False,
    capability: tuple[int, int] | None = None,
) -> KernelChoice:
    """Chooses the attention kernel.

    Args:
        name: a kernel's name, or ``auto`` for the first that can do what is asked.
        device: ``cpu`` or ``cuda``.
        dtype: the compute type, ``float64``, ``float32`` or ``bfloat16``.
        head_dim: width of a head; of the wider of key and value heads.
        attention_dropout: probability with which attention weights are dropped.
        window: the mask has a sliding window.
        deterministic: the same inputs must give the same bits.
        capability: the CUDA device's compute capability (major, minor). None where it is not known
            yet: nothing is refused for it, and ``flash_attn`` stays a name that ``load_kernel``
            turns into a generation.

    Returns:
        The name and the reason; for ``flash_attn`` on a known device the generation's name.

    Raises:
        ConfigError: the named kernel can not do this, or none can.
    """
    wanted = _Wanted(
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        attention_dropout=attention_dropout,
        window=window,
        deterministic=deterministic,
        capability=capability,
    )
    if name != "auto":
        if name not in KERNEL_NAMES:
            raise ConfigError("--kernel", name, "is no kernel", ", ".join(["auto", *KERNEL_NAMES]))
        taken, text = _try(name, wanted)
        if taken is None:
            raise _refusal(name, text, wanted)
        return KernelChoice(name=taken, reason=f"asked for: {text}")
    if device not in _PREFERENCE:
        raise ConfigError("device", device, "has no attention kernel", ", ".join(_PREFERENCE))
    passed_over: list[str] = []
    for candidate in _PREFERENCE[device]:
        taken, text = _try(candidate, wanted)
        if taken is not None:
            return KernelChoice(name=taken, reason="; ".join([text, *passed_over]))
        passed_over.append(f"not {candidate}: {text}")
    raise _refusal(name, "; ".join(passed_over), wanted)


def flash_attention_for(capability: tuple[int, int] | None, *, deterministic: bool = False) -> str:
    """The generation ``flash_attn`` stands for where head dim and mask are not known.

    It can then do all that the name promises (head dims up to 256), if such a one is installed.

    Args:
        capability: the device's compute capability; None: any.
        deterministic: its backward must be.

    Raises:
        ConfigError: none is installed for this device.
    """
    usable = [
        TRAITS[name]
        for name in _generations(capability)
        if _installed(TRAITS[name]) and _runs_on(TRAITS[name], capability)
    ]
    whole = [traits for traits in usable if _largest(traits, capability, deterministic) >= 256]
    if not usable:
        raise ConfigError("--kernel", "flash_attn", _NO_PACKAGE, TRAITS["flash_attn_2"].install)
    return (whole or usable)[0].name


_NO_PACKAGE = "needs the package flash_attn, which is not installed"


def _try(name: str, wanted: _Wanted) -> tuple[str | None, str]:
    """The kernel that ``name`` comes to and what it is, or None and why there is none."""
    if name != "flash_attn":
        problem = _problem(TRAITS[name], wanted)
        return (None, problem) if problem else (name, TRAITS[name].summary)
    generations = [TRAITS[other] for other in _generations(wanted.capability)]
    problems = {traits.name: _problem(traits, wanted) for traits in generations}
    able = [traits for traits in generations if not problems[traits.name]]
    if able and wanted.capability is None:
        return name, "the flash-attn package, the newest generation for the device"
    if able:
        return able[0].name, able[0].summary
    if wanted.device not in generations[0].devices:
        return None, problems[generations[0].name]
    present = [traits.name for traits in generations if _installed(traits)]
    return None, "; ".join(f"{x} {problems[x]}" for x in present) or _NO_PACKAGE


def _refusal(name: str, problem: str, wanted: _Wanted) -> ConfigError:
    """The error naming what works instead."""
    others = [x for x in KERNEL_NAMES[:5] if x != name and _try(x, wanted)[0] is not None]
    works = [f"--kernel {other}" for other in ["auto", *others]] if others else []
    if wanted.attention_dropout and "dropout" in problem:
        works.append("--attention-dropout 0")
    if "not installed" in problem:
        works.append(TRAITS[name if name in TRAITS else "flash_attn_2"].install)
    return ConfigError("--kernel", name, problem, " or ".join(works))


def _problem(traits: KernelTraits, wanted: _Wanted) -> str:
    """Why this backend can not do it; empty when it can."""
    if wanted.device not in traits.devices:
        return f"runs on {' or '.join(traits.devices)}, not on {wanted.device}"
    if not _installed(traits):
        return f"needs the package {traits.package}, which is not installed"
    if wanted.dtype not in traits.dtypes:
        return f"computes in {', '.join(traits.dtypes)}, not in {wanted.dtype}"
    if not _runs_on(traits, wanted.capability):
        majors = " or ".join(str(major) for major in traits.capabilities)
        return f"needs compute capability {majors}, the device has {_dotted(wanted.capability)}"
    largest = _largest(traits, wanted.capability, False)
    if wanted.head_dim > largest:
        return f"head dim {wanted.head_dim} is above its largest, {largest}"
    if wanted.window and not traits.windows:
        return "has no sliding windows"
    if wanted.attention_dropout and not traits.dropout:
        return "has no attention dropout that is the same on every layout and number of ranks"
    if wanted.deterministic and not traits.deterministic_head_dim:
        return "its backward is not deterministic"
    if wanted.deterministic and wanted.head_dim > traits.deterministic_head_dim:
        return f"is deterministic up to head dim {traits.deterministic_head_dim} only"
    return ""


def _generations(capability: tuple[int, int] | None) -> Sequence[str]:
    """In the order they are tried."""
    return _HOPPER if capability and capability[0] == 9 else FLASH_ATTENTION


def _runs_on(traits: KernelTraits, capability: tuple[int, int] | None) -> bool:
    return not (capability and traits.capabilities) or capability[0] in traits.capabilities


def _largest(traits: KernelTraits, capability: tuple[int, int] | None, deterministic: bool) -> int:
    """The largest head dim, on this device."""
    major = capability[0] if capability else 0
    largest = dict(traits.wider_on).get(major, traits.max_head_dim)
    return min(largest, traits.deterministic_head_dim) if deterministic else largest


def _dotted(capability: tuple[int, int] | None) -> str:
    return ".".join(str(part) for part in capability or ())


def _installed(traits: KernelTraits) -> bool:
    """Whether its module can be found. Nothing is imported: these packages load torch and CUDA."""
    if traits.package is None:
        return True
    first, *rest = traits.package.split(".")
    spec = importlib.util.find_spec(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec is not None
