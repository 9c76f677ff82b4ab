"""Loads a kernel by its name."""

from __future__ import annotations

from functools import cache

import torch

from cp_megatron.errors import ConfigError
from cp_megatron.kernels.cpu import CpuKernel
from cp_megatron.kernels.cuda import CudaKernel
from cp_megatron.kernels.cudnn import CudnnKernel
from cp_megatron.kernels.interface import Kernel
from cp_megatron.kernels.reference import ReferenceKernel
from cp_megatron.kernels.select import FLASH_ATTENTION, flash_attention_for


@cache
def load_kernel(name: str, *, deterministic: bool = False) -> Kernel:
    """Loads the backend that ``select_kernel`` chose.

    Args:
        name: a kernel's name. ``flash_attn`` is the newest generation that is installed and runs on
            this device, preferably one that supports every head dim up to 256.
        deterministic: the same inputs give the same bits.

    Raises:
        ConfigError: the backend cannot be deterministic.
        ImportError: its package is not installed.
    """
    if name == "flash_attn":
        available = torch.cuda.is_available()
        capability = torch.cuda.get_device_capability() if available else None
        name = flash_attention_for(capability, deterministic=deterministic)
    if name in FLASH_ATTENTION:
        # The package is optional, and this is the only place that needs it.
        from cp_megatron.kernels.flash_attn import load_flash_attention

        return load_flash_attention(name, deterministic=deterministic)
    if name == "cudnn" and deterministic:
        rule = "its backward is not deterministic"
        raise ConfigError("--kernel", name, rule, "--kernel cuda or --kernel flash_attn")
    if name == "cudnn":
        return CudnnKernel()
    if name == "cuda":
        return CudaKernel(deterministic=deterministic)
    kernels: dict[str, type[Kernel]] = {"reference": ReferenceKernel, "cpu": CpuKernel}
    return kernels[name]()
