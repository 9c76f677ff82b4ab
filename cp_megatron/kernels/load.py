"""A kernel's name to the kernel."""

from __future__ import annotations

from functools import cache

from cp_megatron.kernels.cpu import CpuKernel
from cp_megatron.kernels.cuda import CudaKernel
from cp_megatron.kernels.interface import Kernel
from cp_megatron.kernels.reference import ReferenceKernel


@cache
def load_kernel(name: str) -> Kernel:
    """The backend ``select_kernel`` chose."""
    if name == "flash_attn":
        # Imported here because the package is optional and this is the one place that needs it.
        from cp_megatron.kernels.flash_attn import FlashAttnKernel

        return FlashAttnKernel()
    kernels: dict[str, type[Kernel]] = {
        "reference": ReferenceKernel,
        "cpu": CpuKernel,
        "cuda": CudaKernel,
    }
    return kernels[name]()
