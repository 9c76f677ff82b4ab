"""Context parallelism: each rank holds a part of the sequence, and attention covers all of it."""

from cp_megatron.context_parallel.api import ContextParallel
from cp_megatron.context_parallel.attention_function import KeptAttention
from cp_megatron.context_parallel.received import Received

__all__ = ["ContextParallel", "KeptAttention", "Received"]
