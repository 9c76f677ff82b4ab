"""The pipeline stages of a run in words, for the start table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cp_megatron.plan import Mask
from cp_megatron.plan.pipeline import PipelinePlan
from cp_megatron.plan.stages import Chunk
from cp_megatron.preflight.run_plan import RunPlan, dtype_on
from cp_megatron.spec import ModelSpec, is_sharded, stage_weights

_WAITS_LONG = 0.1
_ELEMENT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2}
_STAGES_SHOWN = 8


def stages_of(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """The schedule, the messages and the layers of stages, as labels and values; nothing without
    stages."""
    stages, pp = plan.stages, plan.grid.pp
    if pp == 1:
        return
    schedule = PipelinePlan(pp, plan.num_microbatches, stages.num_chunks)
    interleaved = f"interleaved 1F1B, {stages.num_chunks} virtual stages on each rank"
    name = "1F1B" if stages.num_chunks == 1 else interleaved
    waits = f"stages wait for {schedule.bubble:.0%} of the time"
    micro = "micro batches" if plan.num_microbatches > 1 else "micro batch"
    text = f"{name}: {waits} with {plan.num_microbatches:,} {micro}"
    if schedule.bubble > _WAITS_LONG:
        text += "; less with a smaller --micro-batch-size or a larger --global-batch-size"
    yield "pipeline", text
    yield "", _messages(plan)
    offloads = plan.config.memory.optimizer_cpu_offload
    sharded = is_sharded(plan.config.model, plan.grid, offloads=offloads)
    if sharded and plan.keeps_whole_weights:
        kept = "whole weights and gradients of a stage are kept until the end of a step"
        yield "", f"{kept} (--fsdp-reshard)"
    shares = _shares(plan)
    for stage, share in enumerate(shares):
        if pp > _STAGES_SHOWN and stage == _STAGES_SHOWN - 2:
            yield "...", "..."
        if pp <= _STAGES_SHOWN or stage < _STAGES_SHOWN - 2 or stage == pp - 1:
            parts = " and ".join(map(_part, stages.of(stage)))
            yield f"stage {stage}", f"{parts}: {share:.1%} of the FLOPs"


def _part(chunk: Chunk) -> str:
    numbers = chunk.layers
    layers = f"layers {numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else ""
    if len(numbers) == 1:
        layers = f"layer {numbers[0]}"
    ends = "embedding" if chunk.has_embedding else "", layers, "head" if chunk.has_head else ""
    return ", ".join(filter(None, ends))


def _shares(plan: RunPlan) -> list[float]:
    """The share of each stage in the FLOPs of a row of one document."""
    model, length = plan.config.model, plan.config.data.seq_length
    spec = ModelSpec.of(model, vocab_size=plan.vocab_size, seq_length=length)
    layers, first, last = stage_weights(spec, Mask.causal(length, model.row_window))
    found = []
    for stage in range(plan.grid.pp):
        chunks = plan.stages.of(stage)
        weight = sum(layers[layer] for chunk in chunks for layer in chunk.layers)
        weight += sum(chunk.has_embedding * first + chunk.has_head * last for chunk in chunks)
        found.append(weight)
    return [weight / sum(found) for weight in found]


def message_bytes(plan: RunPlan, dtype: str) -> int:
    """Bytes that a rank exchanges at one boundary of two parts of the model in a step: the residual
    stream of every micro batch, and its gradients back."""
    rows = 1 if plan.sequence.per_batch else plan.micro_batch_size
    tokens = rows * plan.sequence.layout.shard_len
    if plan.config.parallel.sequence_parallel:
        tokens //= plan.grid.tp
    width = plan.config.model.hidden_size * _ELEMENT_BYTES[dtype]
    return 2 * plan.num_microbatches * tokens * width


def _messages(plan: RunPlan) -> str:
    types = dict.fromkeys(dtype_on(plan.config, device) for device in plan.kernels)
    found = [(message_bytes(plan, dtype), dtype) for dtype in types]
    sizes = [f"{number / 2**20:,.4g} MiB" for number, _ in found]
    if len(found) > 1:
        sizes = [f"{size} in {dtype}" for size, (_, dtype) in zip(sizes, found)]
    boundaries = len(plan.stages.ranges) - 1
    of_all = f"each of {boundaries} boundaries" if boundaries > 1 else "the boundary"
    return f"{of_all} carries {' or '.join(sizes)} a step for each rank of a stage"
