"""Checks a run before torch is imported, and plans it.

``check`` takes a configuration and a launch. It returns the plan of the run, or raises a
``ConfigError`` that names the flag, its value, the rule and a value that works. It reads a few
kilobytes of the checkpoint and of the data (all of the data for ``--train-epochs``, and in a dry
run if it is small); it sends and writes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.fields import check_values, settings
from cp_megatron.data.rows.corpora import check_data
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.errors import ConfigError
from cp_megatron.faults.inject import parse_faults
from cp_megatron.kernels.select import KernelChoice
from cp_megatron.plan import Grid
from cp_megatron.plan.grid import AXES
from cp_megatron.preflight import rules
from cp_megatron.preflight.log_rules import check_log
from cp_megatron.preflight.pretrained import check_load_hf, vocab_size_of
from cp_megatron.preflight.rope_rules import check_rope, rope_notes
from cp_megatron.preflight.run_length import (
    check_unfinished,
    continued_from,
    repetition,
    with_last_step,
    with_rows,
)
from cp_megatron.preflight.run_plan import DeviceName, RunPlan, kernel_on
from cp_megatron.preflight.save_and_load import check_resume, check_save, data_changes, find_load
from cp_megatron.preflight.schedule_rules import (
    check_schedule,
    check_units,
    check_warmup,
    schedule_notes,
)
from cp_megatron.preflight.sequence import plan_sequence


def check(
    config: Config,
    launch: Launch,
    *,
    dry_run: bool = False,
    dry_run_world_size: int | None = None,
    given: frozenset[str] = frozenset(),
    auto: bool = False,
    argv: Sequence[str] = (),
    script: str = "launch/pretrain.py",
) -> RunPlan:
    """Plans the run.

    Args:
        config: the run.
        launch: how this process was started.
        dry_run: only the plan is shown: the world may have any size, by default the smallest.
        dry_run_world_size: the world size to plan for instead.
        given: flags the user typed; one of them without an effect is refused.
        auto: the same command is used to start the run and to continue it.
        argv: the user's arguments, for the corrected command.
        script: the program as the user called it, for the corrected command.

    Raises:
        FinishedError: ``auto``, and the run is finished.
        ConfigError: the run is not possible.
    """
    if not dry_run:
        parse_faults(launch.fault, launch.world_size)
    check_values(config)
    config = replace(config, data=rules.with_packing(config.data, given))
    vocab_size, told = _check_model(config, given)
    # After the model: a command with more ranks is no help if the heads forbid the grid.
    grid, notes = _grid(config, launch, dry_run, dry_run_world_size, [script, *argv])
    one_node = dry_run and not launch.under_torchrun
    plan = _plan(config, launch, grid, vocab_size, given, one_node=one_node, dry_run=dry_run)
    rules.check_saving(config.checkpoint)
    plan = _with_checkpoint(plan, auto=auto)
    check_warmup(plan, given)
    check_log(
        config.log,
        first_step=plan.load_step,
        last_step=plan.last_step,
        world_size=grid.world_size,
        given=given,
    )
    more = *schedule_notes(plan), *rope_notes(config, given)
    if dry_run:  # a run adds this when it has read its data
        plan = with_rows(plan)
        more = *more, *repetition(plan)
    return replace(plan, notes=(*notes, *told, *plan.notes, *more))


def _check_model(config: Config, given: frozenset[str]) -> tuple[int, tuple[str, ...]]:
    """Checks the model and how it is split.

    Returns:
        the size of its vocabulary, and notes about its tokenizer.
    """
    model, seq_length = config.model, config.data.seq_length
    tokenizer = tokenizer_of(config.data)
    vocab_size = vocab_size_of(model, tokenizer)
    padded = model.padded_vocab_size(vocab_size)
    rules.check_model(model, seq_length)
    check_rope(model, seq_length, given)
    rules.check_window(model)
    rules.check_memory(config.memory, model.num_layers, given)
    rules.check_tensor_parallel(model, config.parallel.tensor_parallel_size, padded)
    return vocab_size, tokenizer.notes


def _plan(
    config: Config,
    launch: Launch,
    grid: Grid,
    vocab_size: int,
    given: frozenset[str],
    *,
    one_node: bool,
    dry_run: bool,
) -> RunPlan:
    """The plan of a new run: its batch, its rows, its kernels and its data."""
    rows, micro_batch_size, num_microbatches = rules.check_batch(config.data, grid.dp)
    packed = micro_batch_size if config.data.document_mask else 1
    sequence = plan_sequence(config, grid, launch, rows=packed, given=given, one_node=one_node)
    check_schedule(config.optimizer, given)
    check_units(config.optimizer, given)
    validates = rules.check_data(config.data, config.train, given)
    kernels = _kernels(config)
    told = check_data(config.data, dry_run=dry_run)
    resolved, notes = _resolved(config, grid, rows, validates)
    return RunPlan(
        config=resolved,
        grid=grid,
        device=None if config.train.device == "auto" else config.train.device,
        kernels=kernels,
        sequence=sequence,
        vocab_size=vocab_size,
        padded_vocab_size=config.model.padded_vocab_size(vocab_size),
        micro_batch_size=micro_batch_size,
        num_microbatches=num_microbatches,
        notes=(*told, *sequence.notes, *notes),
    )


def _with_checkpoint(plan: RunPlan, *, auto: bool) -> RunPlan:
    """The plan with the checkpoint to continue from, if any, and notes about it."""
    config, notes = plan.config, plan.notes
    loaded = find_load(config)
    if loaded is not None:
        check_resume(config, loaded.manifest, plan.vocab_size)
        notes = (*data_changes(config, loaded.manifest), *notes)
        plan = continued_from(plan, loaded.folder, loaded.manifest)
        plan = replace(plan, passed_over=loaded.passed_over)
    plan = with_last_step(plan)
    check_unfinished(plan, auto=auto)
    notes = (*check_load_hf(config), *notes)
    check_save(config, loaded, auto=auto)
    return replace(plan, notes=notes)


def _kernels(config: Config) -> dict[DeviceName, KernelChoice]:
    """The kernel for each device that the flags allow; raises if no device has one."""
    asked = config.train.device
    devices: tuple[DeviceName, ...] = ("cpu", "cuda") if asked == "auto" else (asked,)
    kernels: dict[DeviceName, KernelChoice] = {}
    refusals: list[ConfigError] = []
    for device in devices:
        try:
            kernels[device] = kernel_on(config, device)
        except ConfigError as error:
            refusals.append(error)
    if not kernels:
        # That a kernel does not run on a device at all is the least helpful of the reasons.
        raise min(refusals, key=lambda error: "runs on" in error.rule)
    return kernels


def _grid(
    config: Config, launch: Launch, dry_run: bool, world_size: int | None, command: Sequence[str]
) -> tuple[Grid, tuple[str, ...]]:
    """The grid over the ranks of this launch or of the dry run, and a note about its size."""
    sizes = {axis: getattr(config.parallel, name) for axis, name in AXES.items() if name}
    smallest = Grid(**sizes)
    inner = smallest.world_size
    if world_size is not None:
        if world_size < 1:
            raise ConfigError("--world-size", world_size, "must be positive", str(inner))
        if world_size % inner:
            rule = f"must be divisible by {_axis_flags(smallest)} = {inner}"
            raise ConfigError("--world-size", world_size, rule, rules.multiples(world_size, inner))
        return Grid(dp=world_size // inner, **sizes), ()
    if dry_run and not launch.under_torchrun:
        note = f"no --world-size given: planned for {inner}, the smallest world"
        return smallest, (note,)
    if launch.world_size % inner:
        raise _wrong_world(launch, smallest, command)
    return Grid(dp=launch.world_size // inner, **sizes), ()


def _axis_flags(grid: Grid) -> str:
    """The flags that give the axes of this grid their sizes, the slowest first."""
    sizes = {AXES[axis]: size for axis, size in grid.sizes.items() if size > 1}
    return " x ".join(f"{settings()[name].flag} {size}" for name, size in sizes.items())


def _wrong_world(launch: Launch, smallest: Grid, command: Sequence[str]) -> ConfigError:
    """The error for a world that the grid does not divide, with a whole command that works."""
    inner, world = smallest.world_size, launch.world_size
    started = "torchrun started" if launch.under_torchrun else "plain python starts"
    rule = f"needs a multiple of {inner} ranks, but {started} {world}"
    flag, _, value = _axis_flags(smallest).rpartition(" ")
    ranks = max(inner, world // inner * inner)
    works = shlex.join(["torchrun", "--nproc-per-node", str(ranks), *command])
    if launch.nodes > 1:
        works = f"{rules.multiples(world, inner)} ranks over all nodes"
    return ConfigError(flag, value, rule, works)


def _resolved(
    config: Config, grid: Grid, rows: int, validates: bool
) -> tuple[Config, tuple[str, ...]]:
    """The configuration completed with what follows from the grid, and notes about it."""
    notes: list[str] = []
    parallel, train = config.parallel, config.train
    if parallel.sequence_parallel and grid.tp == 1:
        parallel = replace(parallel, sequence_parallel=False)
        notes.append("--sequence-parallel is off: there is one tensor parallel rank")
    if train.eval_iters and not validates:
        train = replace(train, eval_iters=0)
        own = "" if config.data.train_data_path else f"--split {config.data.split} has "
        notes.append(f"{own or 'there is '}no validation part: nothing is validated")
    if train.bf16:
        train = replace(train, bf16=False, dtype="bfloat16")
    data = replace(config.data, global_batch_size=rows)
    return replace(config, parallel=parallel, train=train, data=data), tuple(notes)
