"""Who holds which tokens, who computes which tile, who sends what to whom: plain data, no torch."""

from cp_megatron.plan.grid import Coordinates, Grid
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.schedule import Schedule

__all__ = ["Coordinates", "Grid", "Mask", "Schedule", "SequenceLayout"]
