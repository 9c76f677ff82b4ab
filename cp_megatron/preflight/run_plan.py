"""The plan of a run: its configuration and all that follows from it before torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cp_megatron.config import Config
from cp_megatron.data.rows.corpora import Data
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.select import KernelChoice, select_kernel
from cp_megatron.plan import Grid, Mask
from cp_megatron.plan.stages import Stages
from cp_megatron.preflight.learning_rate import LearningRate
from cp_megatron.preflight.sequence import SequencePlan
from cp_megatron.spec import ModelSpec, keeps_whole_weights

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
        stages: which layers each pipeline stage has; without stages, one has all.
        vocab_size: number of tokens the model knows; by default that of the tokenizer.
        padded_vocab_size: rows of the embedding.
        micro_batch_size: rows that pass through the model at once.
        num_microbatches: micro batches per step on each rank.
        load: the checkpoint folder (step-N) to continue from.
        load_step: its step; 0 for a new run.
        load_rows: the rows that the run had used by then.
        load_tokens: the tokens that it had trained on by then.
        last_step: the step at which the run ends, whatever it is counted in.
        data: the data, if it had to be read to know that.
        rows_per_epoch: rows in one pass over the training data; None until the data is read.
        passed_over: newer checkpoints that are damaged, and what is wrong with them.
        auto: the same command begins the run and continues it.
        notes: decisions that the flags do not show, for the start table.
    """

    config: Config
    grid: Grid
    device: DeviceName | None
    kernels: Mapping[DeviceName, KernelChoice]
    sequence: SequencePlan
    stages: Stages
    vocab_size: int
    padded_vocab_size: int
    micro_batch_size: int
    num_microbatches: int
    load: Path | None = None
    load_step: int = 0
    load_rows: int = 0
    load_tokens: int = 0
    last_step: int = 0
    data: Data | None = dataclasses.field(default=None, compare=False, repr=False)
    rows_per_epoch: int | None = None
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

    @property
    def spec(self) -> ModelSpec:
        """The model, whole, with the rows of its embedding that padding adds."""
        sizes = {"vocab_size": self.padded_vocab_size, "seq_length": self.config.data.seq_length}
        return ModelSpec.of(self.config.model, **sizes)

    @property
    def keeps_whole_weights(self) -> bool:
        """See ``keeps_whole_weights`` of ``spec/model_spec.py``."""
        return keeps_whole_weights(self.config, self.grid, self.spec)

    @property
    def rows_per_step(self) -> int:
        """Rows of a global batch."""
        assert self.config.data.global_batch_size is not None, "completed when the plan is made"
        return self.config.data.global_batch_size

    def rows_of(self, step: int) -> range:
        """The numbers of the rows of a step that this run trains, from 1."""
        end = self.load_rows + (step - self.load_step) * self.rows_per_step
        return range(end - self.rows_per_step, end)

    def tokens_after(self, step: int) -> int:
        """The tokens that the run has trained on after a step."""
        rows = self.rows_of(step).stop - self.load_rows
        return self.load_tokens + rows * self.config.data.seq_length

    @property
    def counts_rows(self) -> bool:
        """Whether rows rather than steps say how long the run is, and how far it is."""
        train = self.config.train
        return not (train.train_samples is None and train.train_epochs is None)

    @property
    def learning_rate(self) -> LearningRate:
        """The curve of the learning rate."""
        return LearningRate.of(
            self.config.optimizer,
            length=self.config.train.train_samples or self.progress_after(self.last_step),
            rows_per_step=self.rows_per_step,
            in_rows=self.counts_rows,
        )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate.at(self.progress_after(step))

    def progress_after(self, step: int) -> int:
        """How much of the run is done after a step, in the unit of the learning rate's curve."""
        return self.rows_of(step).stop if self.counts_rows else step

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
    return select_kernel(config.parallel.kernel, **kernel_needs(config, device, capability))


def kernel_needs(
    config: Config, device: DeviceName, capability: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What the configuration requests of the attention kernel, as ``select_kernel`` takes it."""
    return {
        "device": device,
        "dtype": dtype_on(config, device),
        "head_dim": max(config.model.head_dim, config.model.value_dim),
        "attention_dropout": config.model.attention_dropout,
        "softcap": config.model.attn_logit_softcapping,
        "window": Mask.causal(1, config.model.window_size).has_window,
        "deterministic": config.train.deterministic,
        "capability": capability,
        "repeats": not config.data.document_mask,
    }
