"""The configuration of a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cp_megatron.config.schema.checkpoint_config import CheckpointConfig
from cp_megatron.config.schema.data_config import DataConfig
from cp_megatron.config.schema.log_config import LogConfig
from cp_megatron.config.schema.memory_config import MemoryConfig
from cp_megatron.config.schema.model_config import ModelConfig
from cp_megatron.config.schema.optimizer_config import OptimizerConfig
from cp_megatron.config.schema.parallel_config import ParallelConfig
from cp_megatron.config.schema.train_config import TrainConfig

PresetName = Literal["toy", "toy-gpt", "gpt2-small", "llama-1b", "llama3-8b"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run."""

    preset: PresetName = "toy"
    """The preset that supplies the defaults of all other flags."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
