"""Choosing the kernel of linear recurrences, with a reason. This module does not import torch."""

from __future__ import annotations

from cp_megatron.kernels.select import KernelChoice


def select_linear_kernel(
    name: str, *, device: str, dtype: str, head_dim: int, v_head_dim: int, deterministic: bool
) -> KernelChoice:
    return KernelChoice(name="reference", reason="PyTorch's own functions, block by block")
