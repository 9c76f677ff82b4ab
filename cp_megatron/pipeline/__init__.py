"""Runs the passes of a pipeline stage and the messages between the stages."""

from cp_megatron.pipeline.run_stage import Outputs, Passes, run_stage
from cp_megatron.pipeline.stage_links import StageLinks

__all__ = ["Outputs", "Passes", "StageLinks", "run_stage"]
