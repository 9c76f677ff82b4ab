"""Runs a checked plan: assembles the trainer, trains under the watch, and ends the run."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from cp_megatron.checkpoint.claim_folder import claimed_folder
from cp_megatron.checkpoint.find_checkpoint import CheckpointChoice
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.checkpoint.object_collectives import (
    all_gather_objects,
    on_all_ranks,
    on_first_rank,
)
from cp_megatron.comm.garbage import frozen_garbage
from cp_megatron.comm.runtime import Launch, record_collectives
from cp_megatron.comm.signals import StopRequest, stop_on_signal
from cp_megatron.config import Config
from cp_megatron.config.files.run_folders import CONFIG_FILE, RUNS
from cp_megatron.config.files.yaml_io import overlay, to_yaml
from cp_megatron.data.rows.corpora import Data, open_data
from cp_megatron.errors import ConfigError
from cp_megatron.faults.checks import Checks, ParameterSums
from cp_megatron.faults.guard import Guard
from cp_megatron.faults.inject import Faults
from cp_megatron.faults.stragglers import Stragglers
from cp_megatron.faults.watch import Watch
from cp_megatron.memory.capacity import fitting
from cp_megatron.metrics.wandb_log import WandbRun
from cp_megatron.metrics.writer import MetricsWriter, keep_aside
from cp_megatron.model.compiled_parts import check_compiler, compile_parts
from cp_megatron.pipeline import StageLinks
from cp_megatron.preflight.run_length import repetition
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.save_and_load import check_save, fresh_run_folder, model_name
from cp_megatron.preflight.start import begin, make_context, make_model, read_and_compare
from cp_megatron.preflight.start_table import print_start
from cp_megatron.tensor_parallel import LossRule
from cp_megatron.train.finish import print_end, show_curves
from cp_megatron.train.kernel_benchmark import with_fastest_kernel
from cp_megatron.train.loop import DivergedError, Trainer
from cp_megatron.train.muon import choose_optimizer
from cp_megatron.train.profiler import StepProfiler
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.resume import verify_load
from cp_megatron.train.saving import Saver
from cp_megatron.train.step import TrainStep


def run(
    plan: RunPlan, launch: Launch, script: str = "launch/pretrain.py", began: float | None = None
) -> int:
    """Trains as planned.

    Args:
        plan: from ``preflight.check``.
        launch: how this process was started.
        script: the program as the user called it, for the command that continues the run.
        began: when the program was started, on ``time.monotonic()``; by default now.

    Returns:
        The exit code: 0 if the run is finished or was stopped by a signal, 1 if it failed.

    Raises:
        ConfigError: a mistake that only torch or reading all of the data can show.
    """
    began = time.monotonic() if began is None else began
    record_collectives()
    (plan,), device, control = begin([plan], launch)
    if device == "cuda":
        own = torch.cuda.get_device_properties(launch.local_rank).total_memory
        least = min(all_gather_objects(own, control))  # all ranks plan alike
        plan, _ = fitting(plan, num_ranks=1, total_bytes=least)
    with claimed_folder(
        lambda: _folder_of(plan.config),
        lambda: _check_unchanged(plan),
        flag="--save",
        again=launch.restarts > 0,
        waits=plan.auto,
        group=control,
    ) as (folder, note):
        config = overlay(plan.config, {"save": str(folder)})
        plan = replace(plan, config=config, notes=(*plan.notes, *filter(None, [note])))
        trainer = replace(assemble(plan, launch, control), began=began)
        dist.barrier(group=control)  # all ranks catch signals from here on
        with stop_on_signal(quiet=launch.rank != 0) as stop, frozen_garbage():
            train = _train if launch.world_size == 1 else _watched
            code = train(trainer, launch, stop, script)
        if not code:  # after a failure, a rank may be gone and would be waited for
            dist.destroy_process_group()
    return code


def _watched(trainer: Trainer, launch: Launch, stop: StopRequest, script: str) -> int:
    """``_train`` among other ranks; a failure is explained once over all ranks."""
    with Watch(
        launch,
        dist.distributed_c10d._get_default_store(),
        folder=trainer.folder,
        program=Path(script).name,
        orphaned=lambda: stop(signal.SIGHUP, None),
        place_of=trainer.plan.grid.place_of,
    ) as watch:
        try:
            return _train(trainer, launch, stop, script)
        except ConfigError:  # all ranks raise it
            raise
        except Exception as error:
            watch.explain(error)
            return 1


def _train(trainer: Trainer, launch: Launch, stop: StopRequest, script: str) -> int:
    if trainer.plan.config.parallel.kernel_benchmark:
        trainer = with_fastest_kernel(trainer)
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
        # When the first rank exits, torchrun ends the others: rank 0 must have printed before that.
        dist.barrier(group=trainer.control)
        return 1
    finally:
        if trainer.writer is not None:
            trainer.writer.close(failed=failed)
    print_end(trainer, launch, script, last)
    return 0


def assemble(plan: RunPlan, launch: Launch, control: dist.ProcessGroup) -> Trainer:
    """Makes the trainer: data, model and folder, loaded if the run continues. For every rank.

    Args:
        plan: on its device.
        launch: how this process was started.
        control: a group of all ranks for CPU tensors; the default group exists.

    Raises:
        ConfigError: the data, the checkpoint or the folder cannot be used; the same on every rank.
    """
    plan = verify_load(plan, control)
    data = read_and_compare(
        control, lambda: plan.data or open_data(plan.config.data, seed=plan.config.train.seed)
    )
    plan = replace(plan, rows_per_epoch=data.rows.train.rows_per_epoch)
    _check_continues(plan, data)
    train_step = _make_train_step(plan, launch, control)
    folder = _make_folder(plan, control)
    config = replace(plan.config, checkpoint=replace(plan.config.checkpoint, save=str(folder)))
    plan = replace(plan, config=config, notes=(*plan.notes, *data.notes, *repetition(plan)))
    start, end, quiet = plan.load_step, plan.last_step, launch.rank != 0
    view = ProgressView(Console(), quiet=quiet, start_step=start, train_iters=end)
    return Trainer(
        plan=plan,
        train_step=train_step,
        rows=data.rows,
        folder=folder,
        control=control,
        saver=Saver(plan, folder, control, data_fingerprint=data.fingerprint, say=view.say),
        writer=_open_metrics(plan, folder) if launch.rank == 0 else None,
        view=view,
        profiler=StepProfiler(
            config.log,
            rank=launch.rank,
            folder=folder,
            start_step=start,
            device=train_step.device,
            say=view.say,
        ),
        guard=_make_guard(plan),
        faults=Faults.of(launch),
        checks=_make_checks(train_step, config, control),
        stragglers=Stragglers(control, train_step.device, launch.local_world_size, plan.grid)
        if config.log.log_straggler
        else None,
    )


def _make_train_step(plan: RunPlan, launch: Launch, control: dist.ProcessGroup) -> TrainStep:
    """The model, initialised or loaded, and its optimizer."""
    config, load_hf_folder = plan.config, plan.config.checkpoint.load_hf
    is_new = plan.load is None and load_hf_folder is None
    is_checked = config.train.check_interval is not None
    model, groups, device = make_model(plan, launch, initialize=is_new)
    if config.train.compile:
        on_all_ranks(partial(check_compiler, device), control)
        compile_parts(model)
    links = StageLinks(groups.channels)
    links.connect(device)
    optimizer = choose_optimizer(model, config.optimizer, group=groups.stage, device=device)
    if plan.load is not None:
        load_checkpoint(
            plan.load, model=model, optimizer=optimizer, verified=True, process_group=control
        )
    elif load_hf_folder is not None:
        load_hf(load_hf_folder, model=model, process_group=control)
    return TrainStep(
        model=model,
        optimizer=optimizer,
        groups=groups,
        cp=make_context(plan, groups),
        device=device,
        seed=config.train.seed,
        clip_grad=config.optimizer.clip_grad,
        rule=LossRule(
            chunk_size=config.memory.loss_chunk_size, z_loss_coeff=config.train.z_loss_coeff
        ),
        sums=ParameterSums(model.named_parameters()) if is_checked else None,
        counts_zeros=config.log.log_num_zeros_in_grad,
        reduces_once=plan.keeps_whole_weights,
        stream_dtype=getattr(torch, plan.dtype or "float32"),
        links=links,
        control=control,
    )


def _make_checks(
    train_step: TrainStep, config: Config, control: dist.ProcessGroup
) -> Checks | None:
    if train_step.sums is None or config.train.check_interval is None:
        return None
    return Checks(
        interval=config.train.check_interval,
        parameters=train_step.sums,
        links=train_step.cp.link_sums,
        stages=train_step.links,
        tied=train_step.model.spec.head.tied,
        groups=train_step.groups,
        control=control,
        device=train_step.device,
    )


def _make_guard(plan: RunPlan) -> Guard:
    """The guard, in the state that the checkpoint kept if the run continues."""
    kept = read_manifest(plan.load).extra.get("guard") if plan.load is not None else None
    train = plan.config.train
    return Guard(budget=train.skip_budget, spike_threshold=train.spike_threshold, kept=kept)


def _open_metrics(plan: RunPlan, folder: Path) -> MetricsWriter:
    """The files of the run and, if requested, Weights & Biases; on rank 0."""
    log, wandb = plan.config.log, None
    if log.wandb_project is not None:
        settings = {**asdict(plan.config), "grid": plan.grid.sizes}
        wandb = WandbRun(log, folder=folder, settings=settings)
    return MetricsWriter(folder, start_step=plan.load_step, wandb=wandb)


def _check_continues(plan: RunPlan, read: Data) -> None:
    """Refuses data other than those of the checkpoint."""
    if plan.load is None:
        return
    data, manifest = plan.config.data, read_manifest(plan.load)
    if manifest.data_fingerprint != read.fingerprint and not data.allow_data_change:
        rule = f"is not the data that {plan.load} was trained on"
        works = "the same files, or --allow-data-change"
        raise ConfigError("--data-path", read.name, rule, works)


def _folder_of(config: Config) -> tuple[Path, bool]:
    """The run's folder, and whether it must be new."""
    save = config.checkpoint.save
    if save is not None:
        return Path(save), False
    return fresh_run_folder(RUNS, model_name(config)), True


def _check_unchanged(plan: RunPlan) -> None:
    """Checks the folder again: until it was locked, another run may have written into it."""
    loaded = None
    if plan.load is not None:
        manifest, passed_over = read_manifest(plan.load), plan.passed_over
        loaded = CheckpointChoice(folder=plan.load, manifest=manifest, passed_over=passed_over)
    check_save(plan.config, loaded, auto=plan.auto)


def _make_folder(plan: RunPlan, control: dist.ProcessGroup) -> Path:
    """Makes the run's folder with the configuration in it, on rank 0.

    A run that continues with other settings keeps the old ones as ``config-step-N.yaml``.
    """

    def make() -> Path:
        folder, is_new = _folder_of(plan.config)
        try:
            folder.mkdir(parents=True, exist_ok=not is_new)
            _write_config(plan, folder / CONFIG_FILE)
        except OSError as error:
            rule = f"cannot be written: {error.strerror}"
            raise ConfigError("--save", folder, rule, "another folder") from None
        return folder

    return on_first_rank(make, control)


def _write_config(plan: RunPlan, file: Path) -> None:
    text = to_yaml(_persistent(plan.config))
    if file.exists():
        if file.read_text(encoding="utf-8") == text:
            return
        keep_aside(file, plan.load_step)
    new = file.with_suffix(".tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(file)  # so that the run always has a complete configuration


def _persistent(config: Config) -> Config:
    """The configuration without what holds only for this start or, like folders, may be moved."""
    return replace(
        config,
        checkpoint=replace(config.checkpoint, save=None, load=None, load_hf=None),
        data=replace(config.data, allow_data_change=False),
        log=replace(config.log, profile=False),
        memory=replace(config.memory, memory_report=False),
    )
