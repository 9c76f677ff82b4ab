"""The layers of each pipeline stage, and the rules of the flags about stages."""

from __future__ import annotations

from cp_megatron.config import Config
from cp_megatron.plan import Mask
from cp_megatron.plan.stages import Stages
from cp_megatron.spec import ModelSpec, stage_weights


def plan_stages(config: Config, vocab_size: int) -> Stages:
    """Which layers each stage has: those of the layout, or else an equal share of the work.

    The work is that of a row of one document, which is the most that documents can cost.

    Args:
        config: the run; its model has been checked.
        vocab_size: number of tokens the model knows.

    Raises:
        ConfigError: the stages cannot share the layers.
    """
    parallel, num_layers = config.parallel, config.model.num_layers
    num_stages = parallel.pipeline_parallel_size
    num_chunks = parallel.num_virtual_stages_per_pipeline_rank
    layout = parallel.pipeline_model_parallel_layout
    if layout is not None:
        return Stages.parse(
            layout, num_layers=num_layers, num_stages=num_stages, num_chunks=num_chunks
        )
    if num_stages == 1:
        return Stages((range(num_layers),), 1)
    length = config.data.seq_length
    spec = ModelSpec.of(config.model, vocab_size=vocab_size, seq_length=length)
    layers, first, last = stage_weights(spec, Mask.causal(length, config.model.row_window))
    return Stages.split(
        layers, first=first, last=last, num_stages=num_stages, num_chunks=num_chunks or 1
    )
