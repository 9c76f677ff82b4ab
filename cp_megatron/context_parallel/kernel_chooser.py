"""The kernel that computes the tiles of an attention: chosen once for each kind of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.interface import Kernel
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.select import KernelChoice, select_kernel
from cp_megatron.plan import Mask


class KernelChooser:
    """Chooses kernels under one mask, and keeps them.

    Attributes:
        mask: which keys each query attends.
    """

    mask: Mask
    _kernel: str
    _deterministic: bool
    _kernels: dict[object, Kernel]

    def kernel_choice(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        dropout: float = 0.0,
        softcap: float | None = None,
    ) -> KernelChoice:
        """Chooses the kernel for inputs of this kind, with a reason."""
        return select_kernel(
            self._kernel,
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            head_dim=head_dim,
            attention_dropout=dropout,
            softcap=softcap,
            window=self.mask.has_window,
            deterministic=self._deterministic,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        )

    def _load_kernel(
        self, q: Tensor, v_head_dim: int, dropout: Dropout | None, softcap: float | None
    ) -> Kernel:
        probability = dropout.probability if dropout else 0.0
        width = max(q.shape[3], v_head_dim)
        key = (q.device, q.dtype, width, probability > 0, softcap)
        if key not in self._kernels:
            choice = self.kernel_choice(q.device, q.dtype, width, probability, softcap)
            self._kernels[key] = load_kernel(
                choice.name, deterministic=self._deterministic, softcap=softcap
            )
        return self._kernels[key]
