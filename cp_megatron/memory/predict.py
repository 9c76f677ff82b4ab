"""Predicts what a rank will hold, kind by kind, from the run plan alone. No torch.

Parameters, gradients and the optimizer's state are permanent. Activations are counted at the end of
the last forward pass before the first backward pass, when most of them exist; without pipeline
stages that is the forward pass of one micro batch. Each block of the spec knows what it keeps. What
autograd keeps of an operation is a fact of torch, so a test compares every number here with what
``measure.py`` measures.

    residual stream x --> norm -----> q, k, v --> attention --> out --> + --> norm --> MLP --> +
                          keeps x,    norm's      q, k, v,      out           as       the wide
                          statistics  result      out, lse                    above    tensors

Each tensor is counted once, for the first module that keeps it. Sizes on the CPU are measured;
where CUDA keeps something else (norms, dropout), they follow torch's sources.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import NamedTuple

from cp_megatron.memory import kinds
from cp_megatron.memory.expert_bytes import row_bytes
from cp_megatron.memory.kept_in_flight import KeptActivations, PassesInFlight
from cp_megatron.memory.kinds import Held
from cp_megatron.plan import Schedule
from cp_megatron.plan.buffer_sizes import AttentionSizes, BufferSizes, RecurrenceSizes
from cp_megatron.plan.halo import Halo, plan_halos
from cp_megatron.plan.stages import Chunk
from cp_megatron.plan.states import StatePlan
from cp_megatron.plan.tiling import own_tiles, pack
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.spec import (
    ActivationSizes,
    KeptStates,
    LinearAttentionSpec,
    MixerSpec,
    ModelSpec,
    ParameterSpec,
    is_hidden_matrix,
    is_sharded,
    local_heads,
)

DECAY = ".decay."
"""Occurs in the names of parameters that are never rounded."""
ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2})


def predict(plan: RunPlan, rank: int) -> tuple[Held, ...]:
    """Predicts what ``rank`` will hold in the first step.

    Args:
        plan: the run, on its device.
        rank: the rank in the whole world.

    Returns:
        One entry per kind and detail, zeros included, in the order of a report. The peak of a step
        is not predicted, because it depends on what operations allocate inside. If every batch has
        documents of its own, exchange buffers, and the states that recurrences keep, are those of
        rows that are one document.
    """
    return predict_ranks(plan, [rank])[0]


def predict_ranks(plan: RunPlan, ranks: Iterable[int]) -> list[tuple[Held, ...]]:
    """The predictions of several ranks; what they share is computed once."""
    spec = plan.spec
    planned = schedules(plan), _recurrence(plan, spec)
    shared = cache(partial(_during_step, plan, spec, planned))
    predicted = []
    for rank in ranks:
        stored, gradients, optimizer = _permanent(plan, rank, spec)
        place = plan.grid.coordinates(rank)
        rows, total = shared(place.pp, place.cp)
        if stored.detail != kinds.HOST:
            # The optimizer has no state before the first step, unless it was loaded.
            total += stored.num_bytes + (optimizer.num_bytes if plan.load else 0)
        last = Held(kind=kinds.AFTER_FORWARD, num_bytes=total)
        predicted.append((stored, gradients, optimizer, *rows, last))
    return predicted


def step_bytes(plan: RunPlan, stage: int, held: Iterable[Held]) -> int:
    """Returns a lower bound of the memory of a step on the device of a rank.

    Backward releases activations while it allocates gradients, so both are held at the same time
    only if gradients of earlier micro batches are there. What is offloaded to the host or to files
    is not counted.

    Args:
        plan: the run, on its device.
        stage: that of the rank.
        held: the prediction for it.
    """
    found = Counter[str]()
    for row in held:
        if row.detail != kinds.HOST and row.kind != kinds.HOST:
            found[row.kind] += row.num_bytes
    forward = found[kinds.GATHERED] + found[kinds.ACTIVATIONS]
    gradients = max(found[kinds.GRADIENTS], found[kinds.WHOLE])
    passes = PassesInFlight.of(plan.stages, stage, plan.num_microbatches)
    together = forward + gradients if passes.meets_gradients else max(forward, gradients)
    return found[kinds.PARAMETERS] + found[kinds.OPTIMIZER] + together


def expert_rows(plan: RunPlan) -> tuple[int, int]:
    """What a layer keeps of the rows of its experts on a rank: as predicted, and at worst."""
    spec = plan.spec
    return row_bytes(spec, _sizes(plan, 0, spec, schedules(plan), None))


def schedules(plan: RunPlan) -> tuple[Schedule, ...]:
    """Builds one schedule for each attention window of the model's layers.

    If documents are masked, each batch has a schedule of its own; these are the schedules of a row
    that is one document.

    Returns:
        The schedules; empty if one rank holds the whole row.
    """
    sequence, model = plan.sequence, plan.config.model
    if plan.grid.cp == 1:
        return ()
    heads, kv_heads, width, v_width = local_heads(model, plan.grid.tp)
    row = Schedule.build(
        *(sequence.mask, sequence.layout, sequence.exchange, sequence.route),
        *(heads, kv_heads, sequence.sizes),
        head_dim=width,
        v_head_dim=v_width,
        latent=model.latent_widths,
        exchange_latent=plan.config.parallel.cp_latent_exchange,
        message_parts=sequence.message_parts,
        rates=sequence.rates,
    )
    attending = (layer for layer in range(model.num_layers) if not model.is_linear(layer))
    windows = map(model.layer_window, attending)
    masks = {mask.window: mask for mask in map(sequence.mask.within, windows)}
    return tuple(map(row.within, masks.values()))


class _Recurrence(NamedTuple):
    """The layers with a state: their description, and what crosses ranks."""

    spec: LinearAttentionSpec
    states: StatePlan
    halos: tuple[Halo, ...]


def _recurrence(plan: RunPlan, spec: ModelSpec) -> _Recurrence | None:
    """What layers with a state exchange, which is the same for all; None without such layers."""
    for layer in spec.layers:
        if (found := layer.recurrence) is not None:
            mask, layout = plan.sequence.mask.within(None), plan.sequence.layout
            states = StatePlan.of(mask, layout, found.local_heads(plan.grid.tp)[0])
            halos = plan_halos(mask, layout, states, found.query_conv.width)
            return _Recurrence(found, states, halos)
    return None


def _during_step(
    plan: RunPlan,
    spec: ModelSpec,
    planned: tuple[tuple[Schedule, ...], _Recurrence | None],
    stage: int,
    cp_rank: int,
) -> tuple[list[Held], int]:
    """The memory of a rank beside the permanent tensors, and the bytes of it after forward."""
    sizes, per_batch = _sizes(plan, cp_rank, spec, *planned), plan.sequence.per_batch
    passes = PassesInFlight.of(plan.stages, stage, plan.num_microbatches)
    activations = KeptActivations(spec, plan.config.memory, sizes, passes, per_batch)
    kept, on_host = activations.by_module()
    gathered = _gathered_bytes(plan, spec, passes.chunks)
    buffers_in_forward, buffers = _buffer_bytes(
        plan, *_of_stage(plan, passes.chunks, *planned), cp_rank, sizes
    )
    logits = 0
    if passes.has_head:
        logits = spec.head.logits_bytes(sizes, plan.config.memory.loss_chunk_size)
    names = kinds.MODULES
    rows = [
        Held(kind=kinds.GATHERED, num_bytes=gathered),
        Held(kind=kinds.WHOLE, num_bytes=_whole_gradients(plan, spec, passes)),
        *(Held(kind=kinds.ACTIVATIONS, detail=name, num_bytes=kept[name]) for name in names),
        Held(kind=kinds.HOST, detail=kinds.RECOMPUTED, num_bytes=on_host),
        Held(kind=kinds.LOGITS, num_bytes=logits),
        Held(kind=kinds.EXCHANGE, num_bytes=buffers),
    ]
    return rows, gathered + kept.total() + buffers_in_forward


def _of_stage(
    plan: RunPlan,
    chunks: Iterable[Chunk],
    planned: tuple[Schedule, ...],
    recurrence: _Recurrence | None,
) -> tuple[list[Schedule], _Recurrence | None]:
    """What the layers of these chunks exchange."""
    model, mask = plan.config.model, plan.sequence.mask
    layers = [number for chunk in chunks for number in chunk.layers]
    attending = [number for number in layers if not model.is_linear(number)]
    windows = {mask.within(model.layer_window(number)).window for number in attending}
    schedules = [schedule for schedule in planned if schedule.mask.window in windows]
    return schedules, recurrence if len(attending) < len(layers) else None


def _buffer_bytes(
    plan: RunPlan,
    planned: Iterable[Schedule],
    recurrence: _Recurrence | None,
    cp_rank: int,
    sizes: ActivationSizes,
) -> tuple[int, int]:
    """Bytes of message buffers after the layers' forward, and after their backward."""
    _, kv_heads, width, v_width = local_heads(plan.config.model, sizes.tp)
    attention = AttentionSizes(
        batch=sizes.batch,
        num_tokens=sizes.row_tokens,
        kv_heads=kv_heads,
        head_dim=width,
        v_head_dim=v_width,
        element=sizes.element,
        exact=sizes.exact,
    )
    buffers = BufferSizes()
    after = []
    for backward in (False, True):
        for schedule in planned:
            buffers.add(schedule, cp_rank, attention, backward=backward)
        if recurrence is not None:
            spec, states, halos = recurrence
            num_heads, _ = spec.local_heads(sizes.tp)
            layer = RecurrenceSizes(
                batch=sizes.batch,
                num_heads=num_heads,
                state=spec.state,
                channels=spec.channels(sizes.tp),
                element=sizes.element,
                exact=sizes.exact,
            )
            buffers.add_recurrence(states, halos[cp_rank], cp_rank, layer, backward=backward)
        after.append(buffers.num_bytes)
    return after[0], after[1]


def _permanent(plan: RunPlan, rank: int, spec: ModelSpec) -> tuple[Held, Held, Held]:
    """Parameters, gradients, and the optimizer's state.

    AdamW has two moments and a step per parameter; Muon has one momentum.
    """
    element = _exact(plan)
    held = partial(spec.parameters_on_rank, plan.grid, rank, plan.stages)
    num_bytes = held() * element
    parameters = list(spec.held(plan.stages.of(plan.grid.coordinates(rank).pp)))
    state = 2 * num_bytes + 4 * sum(copies for _, copies in parameters)
    if plan.config.optimizer.optimizer == "muon":
        state -= held(wanted=is_hidden_matrix) * element
        state -= 4 * sum(copies for x, copies in parameters if is_hidden_matrix(x))
    moved = plan.config.memory.optimizer_cpu_offload and plan.device == "cuda"
    detail = kinds.HOST if moved else ""
    return (
        Held(kind=kinds.PARAMETERS, detail=detail, num_bytes=num_bytes),
        Held(kind=kinds.GRADIENTS, detail=detail, num_bytes=num_bytes),
        Held(kind=kinds.OPTIMIZER, detail=detail, num_bytes=state),
    )


def _exact(plan: RunPlan) -> int:
    """Bytes of a parameter's element, and of its gradient's."""
    return ELEMENT_BYTES["float64" if plan.dtype == "float64" else "float32"]


def _is_sharded(plan: RunPlan) -> bool:
    offloads = plan.config.memory.optimizer_cpu_offload
    return is_sharded(plan.config.model, plan.grid, offloads=offloads)


def _gathered_bytes(plan: RunPlan, spec: ModelSpec, chunks: tuple[Chunk, ...]) -> int:
    """Whole weights at the end of forward, in the compute type, padded to equal shards: those
    outside of the layers, or all that the stage has."""
    assert plan.dtype is not None
    element = ELEMENT_BYTES[plan.dtype]
    if not _is_sharded(plan):
        # Parameters are the weights, or copies are rounded, of which backward reads the norm's.
        is_read = plan.dtype == "bfloat16" and not spec.norm.one_plus
        is_read &= any(chunk.has_head for chunk in chunks)
        return element * (sum(x.numel for x in spec.norm.parameters()) if is_read else 0)
    parameters: Iterable[tuple[ParameterSpec, int]] = ((x, 1) for x in spec.ends(chunks))
    if plan.keeps_whole_weights:
        parameters = spec.held(chunks)
    sizes, total = plan.grid.sizes | {"ep": plan.grid.ep}, 0
    for parameter, copies in parameters:
        ranks = plan.grid.size("edp") if parameter.stacked else plan.grid.shards
        shape = list(parameter.local_shape(sizes))
        rows = shape.pop(parameter.shard_dim(ranks))
        width = _exact(plan) if DECAY in parameter.name else element
        total += -(-rows // ranks) * ranks * math.prod(shape) * copies * width
    return total


def _whole_gradients(plan: RunPlan, spec: ModelSpec, passes: PassesInFlight) -> int:
    """Gradients of whole weights that the last backward pass of a step finds, when all gradients
    are reduced after it."""
    if not (_is_sharded(plan) and plan.keeps_whole_weights):
        return 0
    sizes = plan.grid.sizes | {"ep": plan.grid.ep}
    chunks = [passes.chunks[number] for number in passes.accumulating]
    whole = (math.prod(x.local_shape(sizes)) * copies for x, copies in spec.held(chunks))
    return _exact(plan) * sum(whole)


def _sizes(
    plan: RunPlan,
    cp_rank: int,
    spec: ModelSpec,
    planned: tuple[Schedule, ...],
    recurrence: _Recurrence | None,
) -> ActivationSizes:
    """The sizes of a rank's activations."""
    assert plan.dtype is not None
    element = ELEMENT_BYTES[plan.dtype]
    schedule = planned[0] if planned else None  # that of any layer
    exchange = schedule.heads(cp_rank) if schedule else None
    attention = next(filter(None, (layer.attention for layer in spec.layers)), None)
    transposed = exchange is None and _is_transposed(plan, cp_rank, attention)
    states = KeptStates()
    if recurrence is not None:
        _, chains, halos = recurrence
        states = KeptStates(
            pieces=len(chains.entering[cp_rank]),
            transitions=sum(map(len, chains.through)),
            heads=chains.num_heads_of(cp_rank),
            halo=len(halos[cp_rank].received),
        )
    return ActivationSizes(
        # Rows whose documents are masked are one row.
        batch=1 if plan.sequence.per_batch else plan.micro_batch_size,
        row_tokens=plan.sequence.layout.shard_len,
        tp=plan.grid.tp,
        splits_sequence=plan.config.parallel.sequence_parallel and plan.grid.tp > 1,
        element=element,
        exact=max(4, element),
        on_cuda=plan.device == "cuda",
        head_exchange=exchange,
        sends_latents=schedule is not None and schedule.latent is not None,
        result_copies=2 if transposed else 1,
        states=states,
        ep=plan.grid.ep,
        rows=plan.micro_batch_size,
    )


def _is_transposed(plan: RunPlan, cp_rank: int, attention: MixerSpec | None) -> bool:
    """Whether attention's result is laid out by heads, so that the projection keeps a copy.

    True for the reference kernel without grouped heads when the first tile covers all rows.
    """
    sequence = plan.sequence
    if attention is None:
        return False
    heads, kv_heads, *_ = attention.local_heads(plan.grid.tp)
    if heads != kv_heads or heads == 1:
        return False
    if plan.kernel is None or plan.kernel.name != "reference" or sequence.per_batch:
        return False
    tiles = own_tiles(sequence.mask, pack(sequence.layout.chunks[cp_rank]))
    return (tiles[0].q0, tiles[0].q1) == (0, sequence.layout.shard_len)
