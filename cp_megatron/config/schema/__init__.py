"""The configuration as frozen, typed dataclasses, from which the command line is generated.

A field ``num_layers`` is the flag ``--num-layers``, and the field's docstring is the flag's help.
Names are Megatron's wherever Megatron has one. ``None`` means that the value is derived.
"""

from cp_megatron.config.schema.data_config import DataConfig as DataConfig
from cp_megatron.config.schema.memory_config import MemoryConfig as MemoryConfig
from cp_megatron.config.schema.memory_config import Recompute as Recompute
from cp_megatron.config.schema.memory_config import tokens_with_logits as tokens_with_logits
from cp_megatron.config.schema.model_config import ModelConfig as ModelConfig
from cp_megatron.config.schema.optimizer_config import DecayStyle as DecayStyle
from cp_megatron.config.schema.optimizer_config import OptimizerConfig as OptimizerConfig
from cp_megatron.config.schema.parallel_config import KernelName as KernelName
from cp_megatron.config.schema.parallel_config import ParallelConfig as ParallelConfig
from cp_megatron.config.schema.run_config import CheckpointConfig as CheckpointConfig
from cp_megatron.config.schema.run_config import Config as Config
from cp_megatron.config.schema.run_config import LogConfig as LogConfig
from cp_megatron.config.schema.train_config import TrainConfig as TrainConfig
