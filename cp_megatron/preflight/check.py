"""Checks a run before torch is imported, and plans it.

``check`` takes a configuration and a launch. It returns the plan of the run, or raises a
``ConfigError`` that names the flag, its value, the rule and a value that works. It reads a few
kilobytes of the checkpoint and of the data (all of the data for ``--train-epochs``, and in a dry
run if it is small); it sends and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cp_megatron.checkpoint.find_checkpoint import CheckpointChoice
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.fields import check_values
from cp_megatron.config.files.folder_lock import refuse_held
from cp_megatron.data.rows.corpora import check_data
from cp_megatron.data.rows.small_data import is_small
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.errors import ConfigError, Mistakes
from cp_megatron.families.registry import check_model_type
from cp_megatron.faults.inject import parse_faults
from cp_megatron.kernels.select import KernelChoice
from cp_megatron.plan import Grid
from cp_megatron.plan.stages import Stages
from cp_megatron.preflight import rules
from cp_megatron.preflight.block_rules import check_blocks
from cp_megatron.preflight.expert_rules import check_experts, expert_notes
from cp_megatron.preflight.grid_rules import plan_grid
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
from cp_megatron.preflight.save_and_load import (
    check_optimizer,
    check_resume,
    check_save,
    data_changes,
    find_load,
)
from cp_megatron.preflight.schedule_rules import (
    check_schedule,
    check_units,
    check_warmup,
    schedule_notes,
)
from cp_megatron.preflight.sequence import SequencePlan, plan_sequence
from cp_megatron.preflight.stage_rules import check_reshard, plan_stages

Batch = tuple[int, int, int]
"""Rows per step over all ranks, rows of a micro batch, micro batches per step on each rank."""
Split = tuple[Grid, Batch, SequencePlan, Mapping[DeviceName, KernelChoice]]
"""How the work is divided over ranks, steps and rows, and what computes attention."""


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
    notes: Sequence[str] = (),
    mistakes: Sequence[ConfigError] = (),
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
        notes: what the command line decided, for the start table.
        mistakes: what is wrong with the command line already.

    Raises:
        FinishedError: ``auto``, and the run is finished.
        ConfigError: the run is not possible; several reasons are one ``CombinedError``.
    """
    if not dry_run:
        parse_faults(launch.fault, launch.world_size)
    collected = Mistakes(mistakes)
    with collected.collect():
        check_values(config)
        config = replace(config, data=rules.with_packing(config.data, given))
    vocab_size, of_tokenizer, sound = _check_model(config, given, collected)
    stages: Stages | None = None
    with collected.collect():
        stages = plan_stages(config, vocab_size, given) if sound else None
    grid: Grid | None = None
    with collected.collect():
        # After the model: a command with more ranks is no help if the heads forbid the grid.
        command, known = [script, *argv], vocab_size if sound else None
        grid, of_grid = plan_grid(config, launch, dry_run, dry_run_world_size, command, known)
        notes = (*notes, *of_grid, *of_tokenizer)
    one_node = dry_run and not launch.under_torchrun
    if not dry_run:
        with collected.collect():
            _refuse_held(config, launch, auto=auto)
    split = _split(config, grid, launch, given, collected, sound=sound, one_node=one_node)
    of_data = _check_rest(config, vocab_size, given, collected, auto=auto, dry_run=dry_run)
    assert split is not None, "otherwise there is a mistake"
    assert stages is not None, "likewise"
    plan = _plan(config, split, stages, vocab_size, given)
    plan = _complete(_with_checkpoint(plan, auto=auto), given, dry_run=dry_run)
    return replace(plan, notes=(*notes, *of_data, *plan.notes))


def _complete(plan: RunPlan, given: frozenset[str], *, dry_run: bool) -> RunPlan:
    """Checks what depends on the first and the last step, and adds notes about them."""
    check_warmup(plan, given)
    check_log(
        plan.config.log,
        first_step=plan.load_step,
        last_step=plan.last_step,
        world_size=plan.grid.world_size,
        given=given,
    )
    more = *schedule_notes(plan, given), *rope_notes(plan.config, given)
    more = *more, *expert_notes(plan.config.model, given)
    if dry_run:  # a run adds this when it has read its data
        plan = with_rows(plan)
        more = *more, *repetition(plan)
    return replace(plan, notes=(*plan.notes, *more))


def _check_model(
    config: Config, given: frozenset[str], mistakes: Mistakes
) -> tuple[int, tuple[str, ...], bool]:
    """Checks the model and how it is split.

    Returns:
        The size of its vocabulary, notes about its tokenizer, and whether the model itself is
        possible.
    """
    model, seq_length = config.model, config.data.seq_length
    vocab_size, notes = 0, tuple[str, ...]()
    with mistakes.collect():
        tokenizer = tokenizer_of(config.data)
        vocab_size, notes = vocab_size_of(model, tokenizer), tokenizer.notes
    padded, earlier = model.padded_vocab_size(vocab_size), len(mistakes.errors)
    with mistakes.collect():
        rules.check_model(model, seq_length)
    with mistakes.collect():
        asked = "--hf-model-type" in given
        check_model_type(model, seq_length=seq_length, is_asked=asked)
    with mistakes.collect():
        check_blocks(model, given)
    with mistakes.collect():
        check_experts(config, given)
    with mistakes.collect():
        check_rope(model, seq_length, given)
    with mistakes.collect():
        rules.check_window(model)
    with mistakes.collect():
        rules.check_memory(config.memory, model.num_layers, given)
    with mistakes.collect():
        rules.check_tensor_parallel(model, config.parallel.tensor_parallel_size, padded)
    return vocab_size, notes, len(mistakes.errors) == earlier


def _check_rest(
    config: Config,
    vocab_size: int,
    given: frozenset[str],
    mistakes: Mistakes,
    *,
    auto: bool,
    dry_run: bool,
) -> tuple[str, ...]:
    """Checks what does not depend on the grid, and raises the mistakes that were found.

    Returns:
        Notes about the data.
    """
    notes: tuple[str, ...] = ()
    with mistakes.collect():
        check_schedule(config.optimizer, given)
    with mistakes.collect():
        check_units(config.optimizer, given)
    with mistakes.collect():
        rules.check_kernel_benchmark(config)
    with mistakes.collect():
        rules.check_compile(config)
    with mistakes.collect():
        rules.check_data(config.data, given)
    with mistakes.collect():
        # All of small data is read by a dry run, with notes about all of it.
        notes = check_data(config.data, dry_run=dry_run and not is_small(config.data))
    with mistakes.collect():
        rules.check_saving(config.checkpoint)
    if mistakes.errors:
        with mistakes.collect():
            _check_checkpoint(config, vocab_size, auto=auto)
    mistakes.raise_any()
    return notes


def _split(
    config: Config,
    grid: Grid | None,
    launch: Launch,
    given: frozenset[str],
    mistakes: Mistakes,
    *,
    sound: bool,
    one_node: bool,
) -> Split | None:
    """How the work is divided; None if it cannot be. Rows and kernels need a ``sound`` model."""
    batch: Batch | None = None
    kernels: dict[DeviceName, KernelChoice] = {}
    if sound:
        with mistakes.collect():
            kernels = _kernels(config)
    if grid is None:
        return None
    with mistakes.collect():
        check_reshard(config, grid, given)
    with mistakes.collect():
        batch = rules.check_batch(config.data, grid.dp)
    with mistakes.collect():
        if sound:
            rows = batch[1] if batch and config.data.document_mask else 1
            row = plan_sequence(config, grid, launch, rows=rows, given=given, one_node=one_node)
            return (grid, batch, row, kernels) if batch and kernels else None
    return None


def _plan(
    config: Config, split: Split, stages: Stages, vocab_size: int, given: frozenset[str]
) -> RunPlan:
    """The plan of a new run."""
    grid, (rows, micro_batch_size, num_microbatches), sequence, kernels = split
    resolved, notes = _resolved(config, grid, rows, validates=rules.check_data(config.data, given))
    return RunPlan(
        config=resolved,
        grid=grid,
        device=None if config.train.device == "auto" else config.train.device,
        kernels=kernels,
        sequence=sequence,
        stages=stages,
        vocab_size=vocab_size,
        padded_vocab_size=config.model.padded_vocab_size(vocab_size),
        micro_batch_size=micro_batch_size,
        num_microbatches=num_microbatches,
        notes=(*sequence.notes, *notes),
    )


def _check_checkpoint(config: Config, vocab_size: int, *, auto: bool) -> CheckpointChoice | None:
    """Checks what the run continues from, which is returned, and where it is saved."""
    loaded = find_load(config)
    if loaded is not None:
        check_resume(config, loaded.manifest, vocab_size)
        check_optimizer(config, loaded.manifest)
    check_save(config, loaded, auto=auto)
    return loaded


def _refuse_held(config: Config, launch: Launch, *, auto: bool) -> None:
    """Refuses a folder that another run holds."""
    save = config.checkpoint.save
    # Whether ranks that are started again find their own lock is known when they have met.
    if save is not None and not launch.restarts:
        refuse_held("--save", Path(save), waits=auto)


def _with_checkpoint(plan: RunPlan, *, auto: bool) -> RunPlan:
    """The plan with the checkpoint to continue from, if any, and notes about it."""
    config, notes = plan.config, plan.notes
    loaded = _check_checkpoint(config, plan.vocab_size, auto=auto)
    if loaded is not None:
        notes = (*data_changes(config, loaded.manifest), *notes)
        plan = continued_from(plan, loaded.folder, loaded.manifest)
        plan = replace(plan, passed_over=loaded.passed_over)
    plan = with_last_step(plan)
    check_unfinished(plan, auto=auto)
    notes = (*check_load_hf(config), *notes)
    if auto and loaded is None:
        notes = (f"{config.checkpoint.save} holds no checkpoint yet: a new run begins", *notes)
    return replace(plan, auto=auto, notes=notes)


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


def _resolved(
    config: Config, grid: Grid, rows: int, *, validates: bool
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
    if not config.train.eval_iters and train.eval_interval is not None:
        interval = train.eval_interval
        notes.append(f"--eval-interval {interval} has no effect: --eval-iters 0 validates nothing")
    if train.bf16:
        train = replace(train, bf16=False, dtype="bfloat16")
    data = replace(config.data, global_batch_size=rows)
    return replace(config, parallel=parallel, train=train, data=data), tuple(notes)
