"""The configuration as frozen, typed dataclasses, from which the command line is generated.

A field ``num_layers`` is the flag ``--num-layers``, and the field's docstring is the flag's help.
Names are Megatron's wherever Megatron has one. ``None`` means that the value is derived.
"""

from cp_megatron.config.schema.checkpoint_config import CheckpointConfig
from cp_megatron.config.schema.data_config import DataConfig
from cp_megatron.config.schema.log_config import LogConfig
from cp_megatron.config.schema.memory_config import MemoryConfig, Recompute, tokens_with_logits
from cp_megatron.config.schema.model_config import ModelConfig
from cp_megatron.config.schema.optimizer_config import DecayStyle, OptimizerConfig
from cp_megatron.config.schema.parallel_config import KernelName, ParallelConfig
from cp_megatron.config.schema.run_config import Config
from cp_megatron.config.schema.train_config import TrainConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DecayStyle",
    "KernelName",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recompute",
    "TrainConfig",
    "tokens_with_logits",
]
