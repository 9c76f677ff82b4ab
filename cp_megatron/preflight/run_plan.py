"""The plan of a run: its configuration and all that follows from it before torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cp_megatron.config import Config
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.select import KernelChoice, select_kernel
from cp_megatron.plan import Grid, Mask
from cp_megatron.preflight.sequence import SequencePlan

DeviceName = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that passed every check.

    Attributes:
        config: the run, completed with what follows from the grid: ``global_batch_size`` is a
            number, ``bf16`` is folded into ``dtype``, ``sequence_parallel`` is off at TP 1, and
            ``eval_iters`` is 0 without a validation part.
        grid: the ranks.
        device: None while ``--device auto`` waits for torch; see ``on_device``.
        kernels: the attention kernel and the reason for it, for each device that is still possible.
        sequence: how a row is split. If documents are masked, the rows of a micro batch are one.
        vocab_size: number of tokens the model knows; by default that of the tokenizer.
        padded_vocab_size: rows of the embedding.
        micro_batch_size: rows that pass through the model at once.
        num_microbatches: micro batches per step on each rank.
        load: the checkpoint folder (step-N) to continue from.
        load_step: its step; 0 for a new run.
        passed_over: newer checkpoints that are damaged, and what is wrong with them.
        auto: the same command begins the run and continues it.
        notes: decisions that the flags do not show, for the start table.
    """

    config: Config
    grid: Grid
    device: DeviceName | None
    kernels: Mapping[DeviceName, KernelChoice]
    sequence: SequencePlan
    vocab_size: int
    padded_vocab_size: int
    micro_batch_size: int
    num_microbatches: int
    load: Path | None = None
    load_step: int = 0
    passed_over: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    auto: bool = False
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> str | None:
        """The compute type; None while it depends on a device that is not known."""
        if self.device is not None:
            return dtype_on(self.config, self.device)
        return None if self.config.train.dtype == "auto" else self.config.train.dtype

    @property
    def kernel(self) -> KernelChoice | None:
        """The attention kernel; None while the device is not known."""
        return None if self.device is None else self.kernels[self.device]

    def on_device(
        self, device: DeviceName, note: str = "", capability: tuple[int, int] | None = None
    ) -> RunPlan:
        """The plan on the device that was chosen after torch was imported.

        Args:
            note: the reason for the choice, for the start table.
            capability: of a CUDA device, (major, minor).

        Raises:
            ConfigError: ``--device`` names another one, or the kernel does not run on it.
        """
        asked = self.config.train.device
        if asked not in ("auto", device):
            raise ConfigError("--device", asked, f"there is only {device}", f"--device {device}")
        kernels = {device: kernel_on(self.config, device, capability)}
        notes = (*self.notes, note) if note else self.notes
        return dataclasses.replace(self, device=device, kernels=kernels, notes=notes)


def dtype_on(config: Config, device: DeviceName) -> str:
    """The compute type on ``device``."""
    dtype = "bfloat16" if config.train.bf16 else config.train.dtype
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def kernel_on(
    config: Config, device: DeviceName, capability: tuple[int, int] | None = None
) -> KernelChoice:
    """The attention kernel on ``device``, a CUDA device of the capability (major, minor) if known.

    Raises:
        ConfigError: no kernel can do what the configuration requests.
    """
    return select_kernel(
        config.parallel.kernel,
        device=device,
        dtype=dtype_on(config, device),
        head_dim=config.model.head_dim,
        attention_dropout=config.model.attention_dropout,
        window=Mask.causal(1, config.model.window_size).has_window,
        deterministic=config.train.deterministic,
        capability=capability,
    )
