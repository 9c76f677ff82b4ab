"""From a checked plan to a finished run. The first module on that path that imports torch."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console

from cp_megatron.checkpoint.huggingface import load_hf
from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.runtime import Launch, record_collectives
from cp_megatron.config import Config
from cp_megatron.config.files.run_folders import CONFIG_FILE, RUNS
from cp_megatron.config.files.yaml_io import to_yaml
from cp_megatron.data.rows.corpora import Data, open_data
from cp_megatron.errors import ConfigError
from cp_megatron.faults.checks import Checks, ParameterSums
from cp_megatron.faults.guard import Guard
from cp_megatron.faults.inject import Faults
from cp_megatron.faults.stragglers import Stragglers
from cp_megatron.faults.watch import Watch
from cp_megatron.memory.capacity import check_memory
from cp_megatron.metrics.wandb_log import WandbRun
from cp_megatron.metrics.writer import MetricsWriter, keep_aside
from cp_megatron.model.parallelize import ComputeDType, build_model
from cp_megatron.preflight.run_plan import DeviceName, RunPlan
from cp_megatron.preflight.save_and_load import fresh_run_folder, model_name
from cp_megatron.preflight.start import begin, make_context, read_alike
from cp_megatron.preflight.start_table import print_start
from cp_megatron.tensor_parallel import LossRule
from cp_megatron.train.finish import say_farewell, show_curves
from cp_megatron.train.loop import DivergedError, Trainer
from cp_megatron.train.optimizer import make_optimizer
from cp_megatron.train.profiler import StepProfiler
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.resume import settle_load
from cp_megatron.train.saving import Saver
from cp_megatron.train.signals import StopRequest, stop_on_signal
from cp_megatron.train.step import TrainStep

SAVING = timedelta(hours=2)
"""What the slowest rank's disk may take longer than the fastest's for one checkpoint."""


def run(plan: RunPlan, launch: Launch, script: str = "launch/pretrain.py") -> int:
    """Trains as planned; the exit code: 0 done or stopped in good order, 1 diverged.

    Args:
        plan: what ``preflight.check`` found possible.
        launch: how this process was started.
        script: the program as the user called it, for the command that goes on.

    Raises:
        ConfigError: something that only torch or the whole of the data could tell.
    """
    record_collectives()
    (plan,), device, control = begin([plan], launch)
    if device == "cuda":
        total = torch.cuda.get_device_properties(launch.local_rank).total_memory
        check_memory(plan, num_ranks=1, total_bytes=total)
    trainer = assemble(plan, launch, device, control)
    dist.barrier(group=control)  # no rank ends at a signal that another one waits out
    with stop_on_signal(quiet=launch.rank != 0) as stop, _settled():
        train = _train if launch.world_size == 1 else _watched
        code = train(trainer, launch, stop, script)
    if not code:  # else a rank may be gone, and would be waited for
        dist.destroy_process_group()
    return code


@contextmanager
def _settled() -> Iterator[None]:
    """Python does not look for garbage among all that is there already.

    That would take a seventh of a second, with all that torch brings, in a step of one rank that
    all others wait for.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _watched(trainer: Trainer, launch: Launch, stop: StopRequest, script: str) -> int:
    """``_train`` among other ranks: whatever breaks it is told once."""
    watch = Watch(
        launch,
        dist.distributed_c10d._get_default_store(),
        folder=trainer.folder,
        program=Path(script).name,
        orphaned=lambda: stop(signal.SIGHUP, None),
    )
    with watch:
        try:
            return _train(trainer, launch, stop, script)
        except ConfigError:  # all ranks raise it
            raise
        except Exception as error:
            watch.explain(error)
            return 1


def _train(trainer: Trainer, launch: Launch, stop: StopRequest, script: str) -> int:
    """Trains the assembled run, and says how it ended."""
    if launch.rank == 0:
        print_start(trainer.plan, trainer.folder, trainer.view.console)
    failed = True
    try:
        with trainer.view:
            last = trainer.train(stop)
        failed = False
    except DivergedError as error:
        if launch.rank == 0:
            print(f"{Path(script).name}: error: {error}", file=sys.stderr, flush=True)
            show_curves(trainer)
        # The first rank to leave has torchrun end the others: rank 0 must have spoken before.
        dist.barrier(group=trainer.control)
        return 1
    finally:
        if trainer.writer is not None:
            trainer.writer.close(failed=failed)
    say_farewell(trainer, launch, script, last)
    return 0


def assemble(
    plan: RunPlan, launch: Launch, device_name: DeviceName, control: dist.ProcessGroup
) -> Trainer:
    """Data, model, optimizer and folder, loaded where the run goes on. Called on every rank.

    Args:
        plan: on its device.
        launch: this process.
        device_name: the plan's device.
        control: a group of all ranks for CPU tensors; the default group exists.

    Raises:
        ConfigError: the data, the checkpoint or the folder can not be used; on every rank alike.
    """
    plan = settle_load(plan, control)
    config = plan.config
    found = read_alike(control, lambda: open_data(config.data, seed=config.train.seed))
    _check_continues(plan, found)
    device = torch.device(f"cuda:{launch.local_rank}" if device_name == "cuda" else "cpu")
    train_step = _make_train_step(plan, device)
    if plan.load is not None:
        load_checkpoint(
            plan.load,
            model=train_step.model,
            optimizer=train_step.optimizer,
            verified=True,
            process_group=control,
        )
    elif config.checkpoint.load_hf is not None:
        load_hf(config.checkpoint.load_hf, model=train_step.model, process_group=control)
    checks = _make_checks(train_step, config, control)
    if checks is not None:
        train_step = replace(train_step, sums=checks.parameters)
    folder = _make_folder(plan, control)
    checkpoint = replace(config.checkpoint, save=str(folder))
    notes = (*plan.notes, *found.notes)
    plan = replace(plan, config=replace(config, checkpoint=checkpoint), notes=notes)
    quiet, start = launch.rank != 0, plan.load_step
    view = ProgressView(
        Console(), quiet=quiet, start_step=start, train_iters=config.train.train_iters
    )
    return Trainer(
        plan=plan,
        train_step=train_step,
        rows=found.rows,
        folder=folder,
        control=control,
        saver=Saver(
            plan,
            folder=folder,
            data_fingerprint=found.fingerprint,
            group=_saving_group(config, control),
            say=view.say,
        ),
        writer=None if quiet else _open_metrics(plan, folder),
        view=view,
        profiler=StepProfiler(
            config.log,
            rank=launch.rank,
            folder=folder,
            start_step=start,
            device=device,
            say=view.say,
        ),
        guard=_make_guard(plan),
        faults=Faults.of(launch),
        checks=checks,
        stragglers=Stragglers(control, device) if config.log.log_straggler else None,
    )


def _make_checks(
    train_step: TrainStep, config: Config, control: dist.ProcessGroup
) -> Checks | None:
    """With the sums of the parameters that were drawn or loaded."""
    if config.train.check_interval is None:
        return None
    return Checks(
        interval=config.train.check_interval,
        parameters=ParameterSums(train_step.model.named_parameters()),
        links=train_step.cp.link_sums,
        groups=train_step.groups,
        control=control,
        device=train_step.device,
    )


def _saving_group(config: Config, control: dist.ProcessGroup) -> dist.ProcessGroup:
    """Where ranks speak of a save while they train: ``control`` is in use then."""
    if not config.checkpoint.async_save:
        return control
    group = dist.new_group(backend="gloo", timeout=SAVING)
    assert group is not None
    return group


def _make_guard(plan: RunPlan) -> Guard:
    """As the checkpoint left it, where the run goes on."""
    kept = read_manifest(plan.load).extra.get("guard") if plan.load is not None else None
    train = plan.config.train
    return Guard(budget=train.skip_budget, spike_threshold=train.spike_threshold, kept=kept)


def _open_metrics(plan: RunPlan, folder: Path) -> MetricsWriter:
    """On rank 0: the files of the run, and Weights & Biases where asked for."""
    log, wandb = plan.config.log, None
    if log.wandb_project is not None:
        settings = {**asdict(plan.config), "grid": plan.grid.sizes}
        wandb = WandbRun(log, folder=folder, settings=settings)
    return MetricsWriter(folder, start_step=plan.load_step, wandb=wandb)


def _make_train_step(plan: RunPlan, device: torch.device) -> TrainStep:
    """The initialised model on this rank, and what moves it."""
    config = plan.config
    assert plan.dtype is not None, "known since the device is"
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    groups = ParallelGroups.create(plan.grid, device.type, timeout)
    dtype = cast(ComputeDType, plan.dtype)
    model = build_model(
        config,
        groups,
        vocab_size=plan.vocab_size,
        dtype=dtype,
        device=device,
        initialize=plan.load is None and config.checkpoint.load_hf is None,
    )
    return TrainStep(
        model=model,
        optimizer=make_optimizer(model.parameters(), config.optimizer),
        groups=groups,
        cp=make_context(plan, groups),
        device=device,
        seed=config.train.seed,
        clip_grad=config.optimizer.clip_grad,
        sequence_parallel=config.parallel.sequence_parallel,
        rule=LossRule(
            chunk_size=config.memory.loss_chunk_size, z_loss_coeff=config.train.z_loss_coeff
        ),
    )


def _check_continues(plan: RunPlan, found: Data) -> None:
    """The data and the batch must be what the checkpoint was trained on."""
    if plan.load is None:
        return
    data, manifest = plan.config.data, read_manifest(plan.load)
    if manifest.data_fingerprint != found.fingerprint and not data.allow_data_change:
        rule = f"is not the data that {plan.load} was trained on"
        works = "the same files, or --allow-data-change"
        raise ConfigError("--data-path", found.name, rule, works)
    size = data.global_batch_size or 0
    if manifest.consumed != manifest.step * size:
        before = manifest.consumed // max(1, manifest.step)
        rule = "a run that goes on keeps its batch size, which says where in the data it is"
        raise ConfigError("--global-batch-size", size, rule, str(before))


def _make_folder(plan: RunPlan, control: dist.ProcessGroup) -> Path:
    """The run's folder, made by rank 0, with the configuration in it.

    A run that goes on with other settings keeps the ones before as ``config-step-N.yaml``.
    """
    answer: list[Any] = [None]
    if control.rank() == 0:
        try:
            answer = [_write_config(plan)]
        except OSError as error:
            save = plan.config.checkpoint.save or str(RUNS)
            rule = f"can not be written: {error.strerror}"
            answer = [ConfigError("--save", save, rule, "another folder")]
    dist.broadcast_object_list(answer, group=control, group_src=0)
    if isinstance(answer[0], ConfigError):
        raise answer[0]
    return Path(answer[0])


def _write_config(plan: RunPlan) -> str:
    checkpoint = plan.config.checkpoint
    if checkpoint.save is None:
        RUNS.mkdir(exist_ok=True)
        folder = fresh_run_folder(RUNS, model_name(plan.config))
        folder.mkdir()
    else:
        folder = Path(checkpoint.save)
        folder.mkdir(parents=True, exist_ok=True)
    text, file = to_yaml(_lasting(plan.config)), folder / CONFIG_FILE
    if file.exists():
        if file.read_text(encoding="utf-8") == text:
            return str(folder)
        keep_aside(file, plan.load_step)
    new = file.with_suffix(".tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(file)  # a run is never without one
    return str(folder)


def _lasting(config: Config) -> Config:
    """The run without what holds only now.

    That is where it lies (a folder may be moved), a permission, what is profiled and measured.
    """
    return replace(
        config,
        checkpoint=replace(config.checkpoint, save=None, load=None, load_hf=None),
        data=replace(config.data, allow_data_change=False),
        log=replace(config.log, profile=False),
        memory=replace(config.memory, memory_report=False),
    )
