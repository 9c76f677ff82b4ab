"""Choosing the kernel of linear recurrences, with a reason. This module does not import torch.

There are two: ``reference`` is PyTorch's own functions on any device, and ``fla`` the package
flash-linear-attention on CUDA. The flag ``--kernel`` names kernels of attention. ``--kernel
reference`` means that of recurrences as well; with every other value, a recurrence takes ``fla`` on
the devices and types that it supports. float64 and float32 always take ``reference``: ``fla`` does
not compute in the one, and may round products in the other to TF32, whose errors a chain of states
multiplies. So does a run that must be deterministic, because ``fla`` does not promise it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from cp_megatron.kernels.select import KernelChoice, KernelTraits, is_installed

FLA = KernelTraits(
    *("fla", 256, "the package flash-linear-attention"),
    dtypes=("bfloat16", "float16"),
    deterministic_head_dim=0,
    package="fla.ops.gated_delta_rule",
    install="pip install -e '.[linear]'",
)
"""What ``fla`` can do. ``max_head_dim`` is that of keys; values may have any width."""

_DISTRIBUTION, _OLDEST = "flash-linear-attention", (0, 6)
_REFERENCE = "PyTorch's own functions, block by block"


def select_linear_kernel(
    name: str, *, device: str, dtype: str, head_dim: int, deterministic: bool
) -> KernelChoice:
    """Chooses the kernel of a linear recurrence.

    Args:
        name: the value of ``--kernel``.
        device: ``cpu`` or ``cuda``.
        dtype: the type of queries, keys and values.
        head_dim: the width of a key head.
        deterministic: the same inputs must give the same bits.
    """
    if name == "reference":
        return KernelChoice(name=name, reason=f"asked for: {_REFERENCE}")
    problem = ""
    if device not in FLA.devices:
        problem = f"runs on {' or '.join(FLA.devices)}, not on {device}"
    elif dtype not in FLA.dtypes:
        problem = f"computes in {', '.join(FLA.dtypes)}, not in {dtype}"
    elif head_dim > FLA.max_head_dim:
        problem = f"head dim {head_dim} is above its largest, {FLA.max_head_dim}"
    elif deterministic:
        problem = "it does not promise to be deterministic"
    elif not is_installed(FLA):
        problem = f"needs the package {_DISTRIBUTION}, which is not installed ({FLA.install})"
    elif found := _older_version():
        problem = f"needs {_DISTRIBUTION} {'.'.join(map(str, _OLDEST))} or newer, not {found}"
    if problem:
        return KernelChoice(name="reference", reason=f"{_REFERENCE}; not fla: {problem}")
    return KernelChoice(name=FLA.name, reason=FLA.summary)


def _older_version() -> str:
    """The installed version if it is too old; empty if it is not, or if nothing tells it."""
    try:
        found = version(_DISTRIBUTION)
    except PackageNotFoundError:
        return ""
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    return found if numbers < _OLDEST else ""
