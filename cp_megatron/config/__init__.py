"""What a run is, and how people say it: dataclasses, presets, flags, YAML. No torch."""

from cp_megatron.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    tokens_with_logits,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainConfig",
    "tokens_with_logits",
]
