"""What the memory of a step depends on: its stages, and when whole weights are dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cp_megatron.config.schema.parallel_config import FsdpReshard
from cp_megatron.memory.kept_in_flight import PassesInFlight
from cp_megatron.memory.predict import predict_ranks, step_bytes
from cp_megatron.plan.grid import STAGE
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.spec import is_sharded

MIB = 2**20


def stage_notes(plan: RunPlan) -> Iterator[str]:
    """The fullest pipeline stage, how many passes each stage keeps activations of, and what the
    other ``--fsdp-reshard`` would save or cost; nothing without stages unless it is never.

    Args:
        plan: the run, on its device.
    """
    keeps_whole = plan.keeps_whole_weights
    if plan.grid.pp == 1 and plan.config.parallel.fsdp_reshard != "never":
        return
    needs = stage_needs(plan)
    fullest = needs.index(max(needs))
    where = "a rank"
    if plan.grid.pp > 1:
        where = f"stage {fullest}"
        yield f"{where} is the fullest: a rank holds {_mib(needs[fullest])} at least in a step"
        yield _in_flight(plan)
    offloads = plan.config.memory.optimizer_cpu_offload
    if not is_sharded(plan.config.model, plan.grid, offloads=offloads):
        return
    other: FsdpReshard = "always" if keeps_whole else "never"
    parallel = replace(plan.config.parallel, fsdp_reshard=other)
    changed = stage_needs(replace(plan, config=replace(plan.config, parallel=parallel)))
    more = changed[fullest] - needs[fullest]
    number = f"{2 * plan.num_microbatches:,} times"
    times = (
        f"{number} a step instead of once" if keeps_whole else f"once a step instead of {number}"
    )
    amount = f"{_mib(abs(more))} {'less' if more < 0 else 'more'}"
    yield f"--fsdp-reshard {other} would need {amount} on {where}, and gather weights {times}"


def stage_needs(plan: RunPlan) -> list[int]:
    """What a step needs at least on the first rank of each stage, which has the largest share of
    its stage; bytes."""
    firsts = range(0, plan.grid.world_size, plan.grid.size(STAGE))
    predicted = enumerate(predict_ranks(plan, firsts))
    return [step_bytes(plan, stage, held) for stage, held in predicted]


def _in_flight(plan: RunPlan) -> str:
    stages, num_microbatches = plan.stages, plan.num_microbatches
    passes = [PassesInFlight.of(stages, stage, num_microbatches) for stage in range(plan.grid.pp)]
    numbers = ", ".join(str(each.number) for each in passes)
    share = "" if stages.num_chunks == 1 else f", each through 1 of {stages.num_chunks} parts"
    return f"activations are kept of {numbers} passes on stages 0 to {plan.grid.pp - 1}{share}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.4f} MiB"
