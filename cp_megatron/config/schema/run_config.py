"""The configuration of a whole run, with the settings of its folder and of its reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cp_megatron.config.schema.data_config import DataConfig
from cp_megatron.config.schema.memory_config import MemoryConfig
from cp_megatron.config.schema.model_config import ModelConfig
from cp_megatron.config.schema.optimizer_config import OptimizerConfig
from cp_megatron.config.schema.parallel_config import ParallelConfig
from cp_megatron.config.schema.ranges import Size
from cp_megatron.config.schema.train_config import TrainConfig

PresetName = Literal[
    "toy",
    "toy-gpt",
    "toy-qwen3.5",
    "toy-moe",
    "gpt2-small",
    "llama-1b",
    "llama3-8b",
    "qwen3.5-9b",
    "qwen3-30b-a3b",
    "megatron",
]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where the run is saved, and what it continues from."""

    save: str | None = None
    """The run's folder; by default a new runs/<preset>-<n>, or runs/<folder>-<n> with --load-hf."""
    load: str | None = None
    """The folder of a run to continue, or one of its step-N; its config.yaml supplies all other
    flags. auto, or the folder of --save: continue the run in --save if it has a checkpoint,
    otherwise begin it."""
    load_hf: str | None = None
    """A Hugging Face folder, with config.json and safetensors or pytorch_model.bin, that the run
    starts from; without --preset the learning rate is then 2e-5."""
    save_interval: Size | None = None
    """Steps between two checkpoints; by default there is one at the end or on interruption."""
    async_save: bool = True
    """Copy a checkpoint and write it while training continues."""
    keep_latest_k: Size | None = None
    """Number of newest checkpoints to keep; older ones are removed. By default all are kept."""
    save_retain_interval: Size | None = None
    """Also keep checkpoints whose step is a multiple of this; needs --keep-latest-k."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Reports of the run besides metrics.jsonl and TensorBoard events."""

    wandb_project: str | None = None
    """The Weights & Biases project to send metrics to as well; by default none."""
    wandb_entity: str | None = None
    """The team or user that owns the project; by default the one that is logged in."""
    wandb_exp_name: str | None = None
    """The run's name in Weights & Biases; by default the name of its folder."""
    wandb_save_dir: str | None = None
    """The folder for the files of Weights & Biases; by default the run's folder."""
    log_straggler: bool = True
    """Report ranks that arrive late at a step, or whose device is slow, with the metrics."""
    log_params_norm: bool = False
    """Log the L2 norm of all parameters after the step."""
    log_num_zeros_in_grad: bool = False
    """Log how many numbers of the gradient are exactly 0."""
    plot: bool = True
    """At the end draw curves.png in the run's folder, if matplotlib is installed."""
    profile: bool = False
    """Write a trace of a few steps, trace-rank<N>.json.gz, for https://ui.perfetto.dev."""
    profile_step_start: int = 10
    """The number of finished steps at which the profile begins; the step before it warms up."""
    profile_step_end: int = 12
    """The number of finished steps at which the profile ends."""
    profile_ranks: tuple[int, ...] = (0,)
    """The ranks that write a trace."""
    profile_memory: bool = False
    """Record allocations and frees in the trace."""
    pytorch_profiler_collect_shapes: bool = False
    """Record the shapes of the inputs of every operation in the trace."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run."""

    preset: PresetName = "toy"
    """The preset that supplies the defaults of all other flags: by default toy, or, if any flag of
    the model is given, megatron, which has Megatron-LM's own defaults."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
