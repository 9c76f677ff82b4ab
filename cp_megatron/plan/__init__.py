"""Plans an exchange: which rank holds which tokens, computes which tiles and sends what to whom.

A plan is plain data. This package does not import torch.
"""

from cp_megatron.plan.grid import Coordinates, Grid
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.rates import Rates
from cp_megatron.plan.schedule import Schedule

__all__ = ["Coordinates", "Grid", "Mask", "Rates", "Schedule", "SequenceLayout"]
