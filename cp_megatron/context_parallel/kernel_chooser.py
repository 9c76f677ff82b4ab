"""The kernel that computes the tiles of an attention: chosen once for each kind of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.interface import Kernel
from cp_megatron.kernels.linear_select import select_linear_kernel
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.select import KernelChoice, select_kernel


class KernelChooser:
    """Chooses and loads kernels, each once.

    Args:
        name, deterministic: as ``kernel`` and ``deterministic`` of ``ContextParallel``.
    """

    def __init__(self, name: str, *, deterministic: bool) -> None:
        self._name, self._deterministic = name, deterministic
        self._loaded: dict[object, Kernel] = {}
        self._linear: dict[object, KernelChoice] = {}

    def choice(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        *,
        dropout: float = 0.0,
        softcap: float | None = None,
        window: bool = False,
        repeats: bool = False,
    ) -> KernelChoice:
        """Chooses the kernel for inputs of this kind, with a reason.

        Args:
            device: where the inputs are.
            dtype: their type.
            head_dim: the width of the wider one of key and value heads.
            dropout: the probability with which attention weights are dropped.
            softcap: the bound of the scores; None is none.
            window: whether the mask has a window.
            repeats: whether other batches will have the same tiles.

        Raises:
            ConfigError: the kernel that was asked for, or every kernel, lacks a feature.
        """
        return select_kernel(
            self._name,
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            head_dim=head_dim,
            attention_dropout=dropout,
            softcap=softcap,
            window=window,
            deterministic=self._deterministic,
            repeats=repeats,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        )

    def linear_choice(self, q: Tensor) -> KernelChoice:
        """Chooses the kernel of a linear recurrence of ``q``, [B, S, G, D], with a reason. It looks
        for packages once."""
        key = q.device.type, q.dtype, q.shape[3]
        if key not in self._linear:
            self._linear[key] = select_linear_kernel(
                self._name,
                device=q.device.type,
                dtype=str(q.dtype).removeprefix("torch."),
                head_dim=q.shape[3],
                deterministic=self._deterministic,
            )
        return self._linear[key]

    def load(
        self,
        q: Tensor,
        v_head_dim: int,
        dropout: Dropout | None = None,
        *,
        softcap: float | None = None,
        window: bool,
        repeats: bool,
    ) -> Kernel:
        """Returns the kernel for attention of ``q``, [B, S, H, D]; it is loaded once.

        Args:
            q: gives the device, the type and D.
            v_head_dim: the width of the value heads.
            dropout, softcap, window, repeats: as in ``choice``; None drops nothing.

        Raises:
            ConfigError: as ``choice``.
            ImportError: the kernel's package is not installed.
        """
        probability = dropout.probability if dropout else 0.0
        width = max(q.shape[3], v_head_dim)
        key = q.device, q.dtype, width, probability > 0, softcap, window, repeats
        if key not in self._loaded:
            chosen = self.choice(
                *(q.device, q.dtype, width),
                dropout=probability,
                softcap=softcap,
                window=window,
                repeats=repeats,
            )
            self._loaded[key] = load_kernel(
                chosen.name, deterministic=self._deterministic, softcap=softcap
            )
        return self._loaded[key]
