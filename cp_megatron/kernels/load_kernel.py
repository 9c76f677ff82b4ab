"""Loads a kernel by its name."""

from __future__ import annotations

from functools import cache

from cp_megatron.kernels.cpu import CpuKernel
from cp_megatron.kernels.cuda import CudaKernel
from cp_megatron.kernels.cudnn import CudnnKernel
from cp_megatron.kernels.interface import Kernel
from cp_megatron.kernels.reference import ReferenceKernel
from cp_megatron.kernels.select import FLASH_ATTENTION


@cache
def load_kernel(name: str, *, deterministic: bool = False, softcap: float | None = None) -> Kernel:
    """Loads the backend that ``select_kernel`` chose.

    Args:
        name: its name; a generation of ``flash_attn``, not ``flash_attn`` itself.
        deterministic: the same inputs give the same bits.
        softcap: the kernel replaces scores s by softcap * tanh(s / softcap).

    Raises:
        ImportError: its package is not installed.
    """
    if name in FLASH_ATTENTION:
        # The package is optional, and this is the only place that needs it.
        from cp_megatron.kernels.flash_attn import load_flash_attention

        return load_flash_attention(name, deterministic=deterministic, softcap=softcap)
    if name == "reference":
        return ReferenceKernel(softcap=softcap)
    assert softcap is None, "select_kernel refuses softcaps for the other kernels"
    if name == "cuda":
        return CudaKernel(deterministic=deterministic)
    kernels: dict[str, type[Kernel]] = {"cpu": CpuKernel, "cudnn": CudnnKernel}
    return kernels[name]()
