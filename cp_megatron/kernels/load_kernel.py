"""Loads kernels by their names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from cp_megatron.kernels.cpu import CpuKernel
from cp_megatron.kernels.cuda import CudaKernel
from cp_megatron.kernels.cudnn import CudnnKernel
from cp_megatron.kernels.interface import Kernel
from cp_megatron.kernels.linear_blocks import LinearBlocks
from cp_megatron.kernels.linear_interface import LinearKernel
from cp_megatron.kernels.reference import ReferenceKernel
from cp_megatron.kernels.select import FLASH_ATTENTION
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.states import Piece


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


def load_linear_kernel(
    name: str, mask: Mask, pieces: Sequence[Piece], device: torch.device
) -> LinearKernel:
    """Makes the kernel of a linear recurrence that ``select_linear_kernel`` chose.

    Args:
        name: its name.
        mask: the documents.
        pieces: those of this rank, in order.
        device: where the tokens are.

    Raises:
        ImportError: its package is not installed.
    """
    if name == "fla":
        from cp_megatron.kernels.linear_fla import LinearFla, load_fla

        return LinearFla(load_fla(), mask, pieces, device)
    assert name == "reference"
    return LinearBlocks(mask, pieces, device)
