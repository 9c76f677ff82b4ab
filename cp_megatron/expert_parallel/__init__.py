"""Expert parallelism: tokens are sent to the ranks of their experts, and the results come back."""

from cp_megatron.expert_parallel.dispatch import Dispatch
from cp_megatron.expert_parallel.expert_groups import ExpertParallel
from cp_megatron.expert_parallel.splits import Splits, count_rows

__all__ = ["Dispatch", "ExpertParallel", "Splits", "count_rows"]
