"""The layers of each pipeline stage, and the rules of the flags about stages."""

from __future__ import annotations

from cp_megatron.config import Config
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid, Mask
from cp_megatron.plan.stages import CHUNKS, LAYOUT, SIZE, Stages
from cp_megatron.preflight.rules import refuse_unused
from cp_megatron.spec import ModelSpec, is_sharded, stage_weights

STAGE_FIELDS = frozenset(
    {
        "pipeline_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
        "fsdp_reshard",
    }
)
"""The settings of stages, which only training reads."""


def plan_stages(config: Config, vocab_size: int, given: frozenset[str]) -> Stages:
    """Which layers each stage has: those of the layout, or else an equal share of the work.

    The work is that of a row of one document, which is the most that documents can cost.

    Args:
        config: the run; its model has been checked.
        vocab_size: number of tokens the model knows.
        given: flags the user typed; one of them without an effect is refused.

    Raises:
        ConfigError: the stages cannot share the layers.
    """
    parallel, num_layers = config.parallel, config.model.num_layers
    num_stages = parallel.pipeline_parallel_size
    num_chunks = parallel.num_virtual_stages_per_pipeline_rank
    if num_stages == 1:
        several = num_chunks is not None and num_chunks > 1
        unused = ["num_virtual_stages_per_pipeline_rank"] if several else []
        if parallel.pipeline_model_parallel_layout is not None:
            unused.append("pipeline_model_parallel_layout")
        reason, works = f"without {SIZE} above 1", f"{SIZE} 2 with it"
        refuse_unused(parallel, unused, given, reason=reason, works=works)
        return Stages((range(num_layers),), 1)
    if parallel.pipeline_model_parallel_layout is not None:
        return _of_layout(config, parallel.pipeline_model_parallel_layout, given)
    length = config.data.seq_length
    spec = ModelSpec.of(config.model, vocab_size=vocab_size, seq_length=length)
    layers, first, last = stage_weights(spec, Mask.causal(length, config.model.row_window))
    return Stages.split(
        layers, first=first, last=last, num_stages=num_stages, num_chunks=num_chunks or 1
    )


def _of_layout(config: Config, layout: str, given: frozenset[str]) -> Stages:
    parallel = config.parallel
    try:
        return Stages.parse(
            layout,
            num_layers=config.model.num_layers,
            num_stages=parallel.pipeline_parallel_size,
            num_chunks=parallel.num_virtual_stages_per_pipeline_rank,
        )
    except ConfigError as error:
        if LAYOUT in given:
            raise
        # The run that is loaded had other stages.
        none = f"{LAYOUT} None" + (f" {CHUNKS} 1" if CHUNKS in error.works else "")
        raise ConfigError(
            error.flag, error.value, error.rule, f"{none}, or {error.works}"
        ) from None


def check_reshard(config: Config, grid: Grid, given: frozenset[str]) -> None:
    """Refuses ``--fsdp-reshard`` where FSDP holds no weights.

    Raises:
        ConfigError: it has no effect.
    """
    offloads, parallel = config.memory.optimizer_cpu_offload, config.parallel
    if parallel.fsdp_reshard != "auto" and not is_sharded(config.model, grid, offloads=offloads):
        reason = "on one data and context parallel rank, where no weights are sharded"
        works = "leave it out, or more ranks"
        refuse_unused(parallel, ["fsdp_reshard"], given, reason=reason, works=works)
