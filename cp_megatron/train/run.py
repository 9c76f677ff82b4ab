"""From a checked plan to a finished run. The first module on that path that imports torch."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.checkpoint.store import load_checkpoint
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.runtime import Launch, set_cublas_workspace
from cp_megatron.config import Config
from cp_megatron.config.parse import CONFIG_FILE
from cp_megatron.config.yaml_io import to_yaml
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.sampler import split_rows
from cp_megatron.data.sources import Corpus, load_corpus
from cp_megatron.errors import ConfigError
from cp_megatron.model.parallelize import ComputeDType, build_model
from cp_megatron.train.farewell import say_farewell, show_curves
from cp_megatron.train.folders import fresh_run_folder
from cp_megatron.train.loop import DivergedError, Run
from cp_megatron.train.metrics import MetricsWriter, keep_aside
from cp_megatron.train.optimizer import make_optimizer
from cp_megatron.train.preflight import DeviceName, RunPlan
from cp_megatron.train.profiler import StepProfiler
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.report import print_start
from cp_megatron.train.signals import StopRequest, stop_on_signal
from cp_megatron.train.step import Trainer
from cp_megatron.train.wandb_log import WandbRun

RUNS = Path("runs")


def run(plan: RunPlan, launch: Launch, script: str = "launch/pretrain.py") -> int:
    """Trains as planned; the exit code: 0 done or stopped in good order, 1 diverged.

    Args:
        plan: what ``preflight.check`` found possible.
        launch: how this process was started.
        script: the program as the user called it, for the command that goes on.

    Raises:
        ConfigError: something that only torch or the whole of the data could tell.
    """
    device, note = choose_device(plan, launch)
    capability = torch.cuda.get_device_capability(launch.local_rank) if device == "cuda" else None
    plan = plan.on_device(device, note, capability)
    _start_torch(launch, device, deterministic=plan.config.train.deterministic)
    control = _connect(plan, launch, device)
    try:
        pieces = assemble(plan, launch, device, control)
        dist.barrier(group=control)  # no rank ends at a signal that another one waits out
        with stop_on_signal(quiet=launch.rank != 0) as stop:
            return _train(pieces, launch, stop, script)
    finally:
        with suppress(Exception):  # a broken group must not hide what broke it
            dist.destroy_process_group()


def _train(pieces: Run, launch: Launch, stop: StopRequest, script: str) -> int:
    """Trains the assembled run, and says how it ended."""
    if launch.rank == 0:
        print_start(pieces.plan, pieces.folder, pieces.view.console)
    failed = True
    try:
        with pieces.view:
            last = pieces.train(pieces.plan.load_step, stop)
        failed = False
    except DivergedError as error:
        if launch.rank == 0:
            print(f"{Path(script).name}: error: {error}", file=sys.stderr, flush=True)
            show_curves(pieces)
        # The first rank to leave has torchrun end the others: rank 0 must have spoken before.
        dist.barrier(group=pieces.control)
        return 1
    finally:
        if pieces.writer is not None:
            pieces.writer.close(failed=failed)
    say_farewell(pieces, launch, script, last)
    return 0


def choose_device(plan: RunPlan, launch: Launch) -> tuple[DeviceName, str]:
    """cuda where every local rank has a GPU of its own, else cpu; and what to say about it.

    Raises:
        ConfigError: ``--device cuda`` and there are fewer GPUs than local ranks.
    """
    asked, num_ranks = plan.config.train.device, launch.local_world_size
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and num_gpus < num_ranks:
        rule = f"{num_ranks} ranks on this node need a GPU each, it has {num_gpus}"
        works = f"--nproc-per-node {num_gpus}, or --device cpu" if num_gpus else "--device cpu"
        raise ConfigError("--device", asked, rule, works)
    if asked == "cpu" or num_gpus == 0:
        return "cpu", ""
    if num_gpus < num_ranks:
        return "cpu", f"{num_ranks} ranks and {num_gpus} GPUs on this node: CPU and gloo"
    return "cuda", ""


def _start_torch(launch: Launch, device: DeviceName, *, deterministic: bool) -> None:
    if device == "cuda":
        if deterministic:
            set_cublas_workspace()
            torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(launch.local_rank)
        return
    # torchrun allows one thread a rank whatever the machine; share the cores out instead.
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // launch.local_world_size))


def _connect(plan: RunPlan, launch: Launch, device: DeviceName) -> dist.ProcessGroup:
    """Joins the other ranks; a group of all of them for CPU tensors and objects."""
    timeout = timedelta(minutes=plan.config.parallel.distributed_timeout_minutes)
    backend = "nccl" if device == "cuda" else "gloo"
    options: dict[str, Any] = {"timeout": timeout}
    if not launch.under_torchrun:
        options |= {"store": HashStore(), "rank": 0, "world_size": 1}
    if device == "cuda":
        options["device_id"] = torch.device("cuda", launch.local_rank)
    dist.init_process_group(backend, **options)
    world = dist.group.WORLD
    assert world is not None
    if device == "cpu":
        return world
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert control is not None
    return control


def assemble(
    plan: RunPlan, launch: Launch, device_name: DeviceName, control: dist.ProcessGroup
) -> Run:
    """Data, model, optimizer and folder, loaded where the run goes on. Called on every rank.

    Args:
        plan: on its device.
        launch: this process.
        device_name: the plan's device.
        control: a group of all ranks for CPU tensors; the default group exists.

    Raises:
        ConfigError: the data, the checkpoint or the folder can not be used; on every rank alike.
    """
    config = plan.config
    corpus = _load_same_corpus(plan, control)
    _check_continues(plan, corpus)
    rows = split_rows(
        corpus, split=config.data.split, seq_length=config.data.seq_length, seed=config.train.seed
    )
    device = torch.device(f"cuda:{launch.local_rank}" if device_name == "cuda" else "cpu")
    trainer = _make_trainer(plan, device)
    if plan.load is not None:
        load_checkpoint(
            plan.load, model=trainer.model, optimizer=trainer.optimizer, process_group=control
        )
    folder = _make_folder(plan, control)
    checkpoint = replace(config.checkpoint, save=str(folder))
    plan = replace(plan, config=replace(config, checkpoint=checkpoint))
    quiet, start = launch.rank != 0, plan.load_step
    view = ProgressView(
        Console(), quiet=quiet, start_step=start, train_iters=config.train.train_iters
    )
    return Run(
        plan=plan,
        trainer=trainer,
        rows=rows,
        data_fingerprint=corpus.fingerprint,
        folder=folder,
        control=control,
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
    )


def _open_metrics(plan: RunPlan, folder: Path) -> MetricsWriter:
    """On rank 0: the files of the run, and Weights & Biases where asked for."""
    log, wandb = plan.config.log, None
    if log.wandb_project is not None:
        settings = {**asdict(plan.config), "grid": asdict(plan.grid)}
        wandb = WandbRun(log, folder=folder, settings=settings)
    return MetricsWriter(folder, start_step=plan.load_step, wandb=wandb)


def _make_trainer(plan: RunPlan, device: torch.device) -> Trainer:
    """The initialised model on this rank, and what moves it."""
    config = plan.config
    assert plan.dtype is not None, "known since the device is"
    assert plan.kernel is not None
    groups = ParallelGroups.create(plan.grid, device.type)
    dtype = cast(ComputeDType, plan.dtype)
    model = build_model(config, groups, vocab_size=plan.vocab_size, dtype=dtype, device=device)
    sequence, parallel = plan.sequence, config.parallel
    return Trainer(
        model=model,
        optimizer=make_optimizer(model.parameters(), config.optimizer),
        groups=groups,
        cp=ContextParallel(
            groups.cp,
            sequence.mask,
            layout=sequence.layout.kind,
            exchange="auto" if sequence.exchange == "none" else sequence.exchange,
            kernel=plan.kernel.name,
            route=sequence.route,
            hierarchical_sizes=sequence.sizes,
            deterministic=config.train.deterministic,
            # Masks are a function of the run's rows, alike on every rank that reads them.
            check_ranks="once" if parallel.cp_check_ranks else "never",
        ),
        device=device,
        seed=config.train.seed,
        clip_grad=config.optimizer.clip_grad,
        sequence_parallel=parallel.sequence_parallel,
    )


def _load_same_corpus(plan: RunPlan, control: dist.ProcessGroup) -> Corpus:
    """Every rank reads the data itself, so all must have read the same; they fail together."""
    corpus: Corpus | None = None
    try:
        corpus = load_corpus(plan.config.data.data_path)
        answer: str | ConfigError = corpus.fingerprint
    except ConfigError as error:
        answer = error
    answers: list[Any] = [None] * control.size()
    dist.all_gather_object(answers, answer, group=control)
    for found in answers:
        if isinstance(found, ConfigError):
            raise found
    differing = [rank for rank, found in enumerate(answers) if found != answers[0]]
    assert corpus is not None
    if differing:
        rule = f"ranks {differing[:8]} read other data than rank 0"
        raise ConfigError("--data-path", corpus.name, rule, "the same files on every node")
    return corpus


def _check_continues(plan: RunPlan, corpus: Corpus) -> None:
    """The data and the batch must be what the checkpoint was trained on."""
    if plan.load is None:
        return
    data, manifest = plan.config.data, read_manifest(plan.load)
    if manifest.data_fingerprint != corpus.fingerprint and not data.allow_data_change:
        rule = f"is not the data that {plan.load} was trained on"
        works = "the same files, or --allow-data-change"
        raise ConfigError("--data-path", corpus.name, rule, works)
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
        folder = fresh_run_folder(RUNS, plan.config.preset)
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

    That is where it lies (a folder may be moved), a permission, the steps that are profiled.
    """
    return replace(
        config,
        checkpoint=replace(config.checkpoint, save=None, load=None),
        data=replace(config.data, allow_data_change=False),
        log=replace(config.log, profile=False),
    )
