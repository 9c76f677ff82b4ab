"""Predicts what a rank will hold, kind by kind, from the run plan alone. No torch.

Parameters, gradients and the optimizer's state are permanent. Activations are counted at the end of
the forward pass of one micro batch, when most of them exist; each block of the spec knows what it
keeps. What autograd keeps of an operation is a fact of torch, so a test compares every number here
with what ``measure.py`` measures.

    residual stream x --> norm -----> q, k, v --> attention --> out --> + --> norm --> MLP --> +
                          keeps x,    norm's      q, k, v,      out           as       the wide
                          statistics  result      out, lse                    above    tensors

Each tensor is counted once, for the first module that keeps it. Sizes on the CPU are measured;
where CUDA keeps something else (norms), they follow torch's sources.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import NamedTuple

from cp_megatron.config import MemoryConfig
from cp_megatron.memory.expert_bytes import row_bytes, shared_bytes
from cp_megatron.plan import Schedule
from cp_megatron.plan.buffer_sizes import AttentionSizes, BufferSizes, RecurrenceSizes
from cp_megatron.plan.halo import Halo, plan_halos
from cp_megatron.plan.states import StatePlan
from cp_megatron.plan.tiling import own_tiles, pack
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.spec import (
    ActivationSizes,
    KeptStates,
    LayerSpec,
    LinearAttentionSpec,
    MixerSpec,
    ModelSpec,
    is_sharded,
    local_heads,
)

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2})

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
GATHERED = "gathered weights"
ACTIVATIONS, HOST = "activations", "on the host"
LOGITS, EXCHANGE = "logits", "exchange buffers"
AFTER_FORWARD, PEAK = "held after forward", "peak of the step"

EMBEDDING, INPUTS = "embedding", "layer inputs"
RECOMPUTED = "for recomputation"
ATTENTION_NORM, ATTENTION = "attention norm", "attention"
MLP_NORM, MLP = "MLP norm", "MLP"
FINAL_NORM, LOSS, OTHER = "final norm", "loss", "other"
MODULES = (
    *(EMBEDDING, INPUTS, ATTENTION_NORM, ATTENTION),
    *(MLP_NORM, MLP, FINAL_NORM, LOSS, OTHER),
)
IN_LAYER: Mapping[str, str] = MappingProxyType(
    {"inputs": INPUTS, "attention_norm": ATTENTION_NORM}
    | {"attention": ATTENTION, "recurrence": ATTENTION}
    | {"attention_post_norm": ATTENTION_NORM, "mlp_post_norm": MLP_NORM}
    | {"mlp_norm": MLP_NORM, "mlp": MLP}
)
"""The kinds of what the modules of a layer keep, by their names."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one kind on one rank.

    Attributes:
        kind: ``parameters``, ``gradients`` and ``optimizer`` are permanent; ``gathered weights``
            are whole or rounded weights beside the parameters at the end of forward, when those of
            the layers are freed; ``activations`` are kept for the backward of one micro batch;
            ``logits`` and ``exchange buffers`` are the most at any time.
        detail: for activations the module, over all layers; ``on the host`` if parameters and
            what belongs to them are kept there.
        num_bytes: the number of bytes.
    """

    kind: str
    detail: str = ""
    num_bytes: int


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
    sizes = {"vocab_size": plan.padded_vocab_size, "seq_length": plan.config.data.seq_length}
    spec = ModelSpec.of(plan.config.model, **sizes)
    planned = schedules(plan), _recurrence(plan, spec)
    shared = cache(partial(_during_step, plan, spec, planned))
    predicted = []
    for rank in ranks:
        stored, gradients, optimizer = _permanent(plan, rank, spec)
        rows, total = shared(plan.grid.coordinates(rank).cp)
        if stored.detail != HOST:
            # The optimizer has no state before the first step, unless it was loaded.
            total += stored.num_bytes + (optimizer.num_bytes if plan.load else 0)
        last = Held(kind=AFTER_FORWARD, num_bytes=total)
        predicted.append((stored, gradients, optimizer, *rows, last))
    return predicted


def expert_rows(plan: RunPlan) -> tuple[int, int]:
    """What a layer keeps of the rows of its experts on a rank: as predicted, and at worst."""
    sizes = {"vocab_size": plan.padded_vocab_size, "seq_length": plan.config.data.seq_length}
    spec = ModelSpec.of(plan.config.model, **sizes)
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
    cp_rank: int,
) -> tuple[list[Held], int]:
    """The memory of a rank beside the permanent tensors, and the bytes of it after forward."""
    sizes = _sizes(plan, cp_rank, spec, *planned)
    kept, gathered = _kept(spec, plan.config.memory, sizes), _gathered_bytes(plan, spec)
    on_host = _move_to_host(kept, spec, plan.config.memory, sizes)
    buffers_in_forward, buffers = _buffer_bytes(plan, *planned, cp_rank, sizes)
    logits = spec.head.logits_bytes(sizes, plan.config.memory.loss_chunk_size)
    rows = [
        Held(kind=GATHERED, num_bytes=gathered),
        *(Held(kind=ACTIVATIONS, detail=name, num_bytes=kept[name]) for name in MODULES),
        Held(kind=HOST, detail=RECOMPUTED, num_bytes=on_host),
        Held(kind=LOGITS, num_bytes=logits),
        Held(kind=EXCHANGE, num_bytes=buffers),
    ]
    return rows, gathered + kept.total() + buffers_in_forward


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
    element = ELEMENT_BYTES["float64" if plan.dtype == "float64" else "float32"]
    num_bytes = spec.parameters_on_rank(plan.grid, rank) * element
    state = 2 * num_bytes + 4 * spec.num_tensors()
    if plan.config.optimizer.optimizer == "muon":
        matrices = list(spec.hidden_matrices())
        state -= spec.parameters_on_rank(plan.grid, rank, matrices) * element
        state -= 4 * sum(copies for _, copies in matrices)
    moved = plan.config.memory.optimizer_cpu_offload and plan.device == "cuda"
    detail = HOST if moved else ""
    return (
        Held(kind=PARAMETERS, detail=detail, num_bytes=num_bytes),
        Held(kind=GRADIENTS, detail=detail, num_bytes=num_bytes),
        Held(kind=OPTIMIZER, detail=detail, num_bytes=state),
    )


def _gathered_bytes(plan: RunPlan, spec: ModelSpec) -> int:
    """Whole weights at the end of forward, in the compute type, padded to equal shards."""
    assert plan.dtype is not None
    offloads = plan.config.memory.optimizer_cpu_offload
    if not is_sharded(plan.config.model, plan.grid, offloads=offloads):
        # Parameters are the weights, or copies are rounded, of which backward reads the norm's.
        is_read = plan.dtype == "bfloat16" and not spec.norm.one_plus
        read = sum(x.numel for x in spec.norm.parameters()) if is_read else 0
        return ELEMENT_BYTES[plan.dtype] * read
    ranks, total = plan.grid.shards, 0
    for parameter in spec.ends():
        rows, *rest = parameter.local_shape(plan.grid.sizes)
        total += -(-rows // ranks) * ranks * math.prod(rest)
    return total * ELEMENT_BYTES[plan.dtype]


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


def _kept(spec: ModelSpec, memory: MemoryConfig, sizes: ActivationSizes) -> Counter[str]:
    """Bytes by module of what backward reads, summed over layers."""
    kept: Counter[str] = Counter()
    kept[EMBEDDING] = spec.embedding.kept_bytes(sizes)
    if spec.positions is not None:
        kept[EMBEDDING] += spec.positions.kept_bytes(sizes)
    if spec.dropout:
        kept[OTHER] = 8 * sizes.stream_tokens  # where the random stream of each token starts
    levels = _levels(spec, memory)
    for layer, granularity in zip(spec.layers, levels, strict=True):
        for name, num_bytes in _layer_bytes(layer, granularity, memory, sizes).items():
            kept[IN_LAYER[name]] += num_bytes
    # Layers that rotate alike share a rotation. Attention keeps it; the caller does if all of
    # attention is recomputed.
    attentions = filter(None, (layer.attention for layer in spec.layers))
    rotations = {x.rotary: x.rotation_bytes(sizes) for x in attentions}
    rotation = sum(rotations.values())
    kept[ATTENTION if "none" in levels else OTHER] += rotation
    kept[FINAL_NORM] = spec.norm.kept_bytes(sizes.stream_tokens, sizes)
    kept[LOSS] = spec.head.kept_bytes(sizes)
    report, rows = shared_bytes(spec, levels, sizes)
    kept[LOSS] += report
    kept[OTHER] += rows
    return kept


def _levels(spec: ModelSpec, memory: MemoryConfig) -> list[str]:
    """What is recomputed of each layer."""
    number, level = memory.recompute_num_layers, memory.recompute_granularity
    return [level if number is None or i < number else "none" for i in range(len(spec.layers))]


def _layer_bytes(
    layer: LayerSpec, granularity: str, memory: MemoryConfig, sizes: ActivationSizes
) -> Counter[str]:
    keeps, tiled = memory.recompute_keeps_attention, memory.mlp_tile_size is not None
    return layer.kept_bytes(sizes, granularity, tiled=tiled, keeps_attention=keeps)


def _move_to_host(
    kept: Counter[str], spec: ModelSpec, memory: MemoryConfig, sizes: ActivationSizes
) -> int:
    """Bytes that recomputed layers keep on the host, which are taken out of ``kept``."""
    moved = Counter[str]()
    for layer, granularity in zip(spec.layers, _levels(spec, memory), strict=True):
        if memory.cpu_offloading and granularity == "full":
            found = _layer_bytes(layer, granularity, memory, sizes)
            moved[INPUTS] += found["inputs"]
            if memory.recompute_keeps_attention and layer.attention is not None:
                moved[ATTENTION] += found["attention"]
    kept.subtract(moved)
    return moved.total()


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
