"""The start table, printed before the first step: ranks, model, data, and why each was chosen.

``--dry-run`` prints the same table for a world of any size, so only a few ranks are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cp_megatron.cli.refusal import printable
from cp_megatron.config import Config, DataConfig
from cp_megatron.config.files.presets import MEGATRON_PRESET, PRESETS
from cp_megatron.config.files.run_folders import RUNS
from cp_megatron.kernels.linear_select import select_linear_kernel
from cp_megatron.plan.grid import STAGE
from cp_megatron.preflight.model_words import (
    experts_of,
    factors_of,
    heads_of,
    mlp_of,
    norms_of,
    positions_of,
    recurrences_of,
    scores_of,
)
from cp_megatron.preflight.run_length import epochs_line
from cp_megatron.preflight.run_plan import RunPlan, dtype_on
from cp_megatron.preflight.save_and_load import model_name
from cp_megatron.preflight.sequence import SequencePlan
from cp_megatron.preflight.stage_words import stages_of

Line = tuple[str, str]
"""A label and its value."""

_RANKS_SHOWN = 8


def print_start(plan: RunPlan, run: Path | None, console: Console | None = None) -> None:
    """Prints the table of a run, by default to standard output.

    Args:
        plan: the run.
        run: the folder it is saved in; None if it is not known yet.
    """
    table = Table(
        box=SIMPLE_HEAD, show_header=False, pad_edge=False, padding=(0, 1), title_justify="left"
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    notes = [("note", note) for note in plan.notes]
    for section in (_world(plan), _model(plan), _choices(plan), _training(plan, run), notes):
        for label, value in section:
            # As Text, because a path may look like rich markup.
            table.add_row(label, Text(printable(value)))
        table.add_section()
    (console or Console()).print(table, highlight=False)


def _world(plan: RunPlan) -> Iterator[Line]:
    grid = plan.grid
    shared = f", experts over ep {grid.ep}" if grid.ep > 1 else ""
    ranks = f"{grid.world_size:,} rank{'s' if grid.world_size > 1 else ''}"
    yield "world", f"{ranks} = {grid}{shared}"
    for rank in shown_ranks(grid.world_size):
        if rank is None:
            yield "...", "..."
            continue
        place = grid.coordinates(rank)
        shown = place if grid.pp > 1 else place.without("pp")
        held = f"{shown}   positions {_positions(plan, place.cp)}"
        if grid.ep > 1:
            held += f"   experts {_experts(plan, rank)}"
        yield f"rank {rank}", held


def shown_ranks(world_size: int) -> list[int | None]:
    """The ranks to show; None stands for those left out."""
    if world_size <= _RANKS_SHOWN:
        return list(range(world_size))
    return [*range(_RANKS_SHOWN - 2), None, world_size - 1]


def _positions(plan: RunPlan, cp_rank: int) -> str:
    sequence = plan.sequence
    if sequence.per_batch and sequence.layout.kind == "balanced" and plan.grid.cp > 1:
        return "differ from batch to batch"
    chunks = [f"{start}-{stop - 1}" for start, stop in sequence.layout.chunks[cp_rank]]
    return ", ".join(chunks if len(chunks) <= 2 else [*chunks[:2], "..."])


def _experts(plan: RunPlan, rank: int) -> str:
    """The experts that the rank computes."""
    share = (plan.config.model.num_experts or 0) // plan.grid.ep
    first = plan.grid.index("ep", rank) * share
    return f"{first}-{first + share - 1}" if share > 1 else f"{first}"


def _model(plan: RunPlan) -> Iterator[Line]:
    config, model, sequence = plan.config, plan.config.model, plan.sequence
    layers = f"{model.num_layers} layers of {model.hidden_size}"
    yield "model", f"{_label(config)}{layers}, {heads_of(model)}"
    yield from (("", words) for words in (*recurrences_of(model), *experts_of(model)))
    yield "", ", ".join((*norms_of(model), positions_of(model), mlp_of(model)))
    if factors := ", ".join(factors_of(model)):
        yield "", factors
    vocabulary = f"{plan.vocab_size} tokens padded to {plan.padded_vocab_size}"
    yield "vocabulary", f"{config.data.tokenizer_type}, {vocabulary}"
    spec = plan.spec
    total, firsts = spec.num_parameters(), range(0, plan.grid.world_size, plan.grid.size(STAGE))
    most = max(spec.parameters_on_rank(plan.grid, rank, plan.stages) for rank in firsts)
    copies = plan.grid.replicas
    over = "dp x cp" if copies == 1 else f"dp x cp / {copies}, in {copies} copies"
    active = f"{spec.num_active_parameters():,} for a token, " if model.num_experts else ""
    placed = f"tp, then sharded over {over}"
    if model.num_experts and plan.grid.world_size > 1:
        within = "" if copies == 1 else " of a copy"
        apart = f"over ep, then over all other ranks{within}"
        placed += f"; experts {apart if plan.grid.ep > 1 else f'over all ranks{within}'}"
    share = f"{most:,} on a rank ({placed})"
    yield "parameters", f"{total:,} in all, {active}{share}"
    padding = f" ({sequence.padding:,} of padding)" if sequence.padding else ""
    on_rank = f"{sequence.layout.shard_len:,} of them on a rank"
    yield "tokens", f"{sequence.row_length:,} per row{padding}, {on_rank}"
    if model.has_attention_layers:
        yield "attention", _attention(plan)


def _label(config: Config) -> str:
    """What the model is called: its folder or preset, and whether it differs from the preset."""
    if config.checkpoint.load_hf is not None:
        return f"{model_name(config)}: "
    if config.preset == MEGATRON_PRESET:
        return ""
    changed = config.model != PRESETS[config.preset].model
    return f"{config.preset}, changed: " if changed else f"{config.preset}: "


def _choices(plan: RunPlan) -> Iterator[Line]:
    types = [f"{device}: {dtype_on(plan.config, device)}" for device in plan.kernels]
    known = f"{plan.device}, {plan.dtype}"
    yield "device", f"auto ({', '.join(types)})" if plan.device is None else known
    for device, kernel in plan.kernels.items():
        label = "kernel" if len(plan.kernels) == 1 else f"kernel on {device}"
        yield label, f"{kernel.name} - {kernel.reason}"
    if plan.config.model.has_linear_layers:
        yield from _recurrences(plan)
    if plan.config.train.compile:
        parts = "norms, rotations, activations"
        yield "compiled", f"{parts}; memory is predicted for a run without --compile"
    if plan.config.train.deterministic:
        yield "deterministic", "on: the same grid repeats bit for bit"
    if plan.grid.cp > 1:
        yield "layout", f"{plan.sequence.layout.kind} - {_layout_reason(plan)}"
    yield "exchange", _exchange(plan.sequence)
    if plan.grid.tp > 1:
        yield "sequence parallel", "on" if plan.config.parallel.sequence_parallel else "off"
    yield from stages_of(plan)


def _recurrences(plan: RunPlan) -> Iterator[Line]:
    """The kernel of recurrences on each device that may be."""
    for device in plan.kernels:
        choice = select_linear_kernel(
            plan.config.parallel.kernel,
            device=device,
            dtype=dtype_on(plan.config, device),
            head_dim=plan.config.model.linear_key_head_dim,
            deterministic=plan.config.train.deterministic,
        )
        label = "recurrences" if len(plan.kernels) == 1 else f"recurrences on {device}"
        yield label, f"{choice.name} - {choice.reason}"


def _attention(plan: RunPlan) -> str:
    model = plan.config.model
    left, layers = (model.window_size or (-1, 0))[0], model.window_layers
    text = "causal, inside each document" if plan.sequence.per_batch else "causal"
    if left >= 0:
        text += f", {left:,} tokens back"
        if layers is not None:
            text += f" in layer{'s' if len(layers) > 1 else ''} {' '.join(map(str, layers))}"
    return ", ".join((text, *scores_of(model)))


def _layout_reason(plan: RunPlan) -> str:
    if plan.config.parallel.cp_layout != "auto":
        return "asked for"
    if plan.sequence.layout.kind == "balanced":
        return "chosen: it distributes each batch's documents evenly over the ranks"
    return "chosen: it gives every rank the same share"


def _exchange(sequence: SequencePlan) -> str:
    name = sequence.exchange
    sends = name in ("p2p", "a2a+p2p") and sequence.route != "auto"
    # The sizes of an exchange that is not chosen yet only tell how ranks lie on nodes.
    if sequence.sizes and name == "a2a+p2p":
        name += f" {sequence.sizes[0]} x {sequence.sizes[1]}"
    route = f", {sequence.route}" if sends else ""
    count = sequence.message_parts or 1
    parts = f", messages in {count} parts" if count > 1 else ""
    return f"{name}{route}{parts} - {sequence.reason}"


def _training(plan: RunPlan, run: Path | None) -> Iterator[Line]:
    config, optimizer, train = plan.config, plan.config.optimizer, plan.config.train
    rows = config.data.global_batch_size or 0
    per_step = rows * config.data.seq_length
    size = f"{plan.micro_batch_size} x dp {plan.grid.dp} x {plan.num_microbatches} accumulated"
    yield "batch", f"{rows} rows = micro batch {size}, {per_step:,} tokens per step"
    curve, unit = plan.learning_rate, " rows" if plan.counts_rows else ""
    warmup = f", warm-up {curve.warmup:,.10g}{unit}" if curve.warmup else ""
    rate = f"lr {optimizer.lr:g} {optimizer.lr_decay_style}{warmup}"
    yield "steps", f"{plan.last_step:,}, {rate}, seed {train.seed}"
    yield "optimizer", _optimizer(plan)
    yield "data", _data(config.data)
    if plan.rows_per_epoch:
        yield "", epochs_line(plan)
    yield "run", f"{run or config.checkpoint.save or RUNS / f'{model_name(config)}-<n>'}"
    if plan.load is not None:
        yield "resumes from", f"{plan.load} (step {plan.load_step})"


def _optimizer(plan: RunPlan) -> str:
    settings = plan.config.optimizer
    if settings.optimizer == "adam":
        return "AdamW"
    iterations = f"{settings.muon_num_ns_steps} {settings.muon_coefficient_type} iterations"
    return f"Muon for the matrices of layers ({iterations}), AdamW for all else"


def _data(data: DataConfig) -> str:
    parts = {"train": data.train_data_path, "valid": data.valid_data_path}
    parts |= {"test": data.test_data_path}
    paths = "; ".join(f"{part}: {' '.join(paths)}" for part, paths in parts.items() if paths)
    return paths or " ".join(data.data_path) or "the sources of Python's standard library"
