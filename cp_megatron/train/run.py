"""From a checked plan to a finished run. The first module on that path that imports torch."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from cp_megatron.checkpoint.manifest import Manifest, step_folder
from cp_megatron.checkpoint.store import load_checkpoint
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.runtime import Launch
from cp_megatron.config.parse import CONFIG_FILE
from cp_megatron.config.yaml_io import to_yaml
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.sampler import split_rows
from cp_megatron.data.sources import Corpus, load_corpus
from cp_megatron.errors import ConfigError
from cp_megatron.model.parallelize import build_model
from cp_megatron.plan import Mask
from cp_megatron.train.folders import fresh_run_folder
from cp_megatron.train.loop import Run
from cp_megatron.train.metrics import MetricsWriter
from cp_megatron.train.optimizer import make_optimizer
from cp_megatron.train.preflight import DeviceName, RunPlan
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.report import print_start
from cp_megatron.train.signals import stop_on_signal
from cp_megatron.train.step import Trainer

RUNS = Path("runs")


def run(plan: RunPlan, launch: Launch, script: str = "launch/pretrain.py") -> int:
    """Trains as planned; the exit code.

    Args:
        plan: what ``preflight.check`` found possible.
        launch: how this process was started.
        script: the program as the user called it, for the command that goes on.

    Raises:
        ConfigError: something that only torch or the whole of the data could tell.
    """
    device, note = choose_device(plan, launch)
    plan = plan.on_device(device, note)
    _start_torch(launch, device)
    with stop_on_signal() as stop:
        control = _connect(plan, launch, device)
        try:
            pieces = _assemble(plan, launch, device, control)
            with pieces.view:
                last = pieces.train(plan.load_step, stop)
            if pieces.writer is not None:
                pieces.writer.close()
            _say_farewell(pieces, launch, script, last, stop.signal is not None)
        finally:
            with suppress(Exception):  # a broken group must not hide what broke it
                dist.destroy_process_group()
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


def _start_torch(launch: Launch, device: DeviceName) -> None:
    if device == "cuda":
        torch.cuda.set_device(launch.local_rank)
        return
    # torchrun allows one thread a rank whatever the machine; share the cores out instead.
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // launch.local_world_size))


def _connect(plan: RunPlan, launch: Launch, device: DeviceName) -> dist.ProcessGroup:
    """Joins the other ranks; a group of all of them for CPU tensors and objects."""
    timeout = timedelta(minutes=plan.config.parallel.distributed_timeout_minutes)
    backend = "nccl" if device == "cuda" else "gloo"
    options: dict[str, Any] = {"timeout": timeout}
    if not launch.under_torchrun:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
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


def _assemble(
    plan: RunPlan, launch: Launch, device_name: DeviceName, control: dist.ProcessGroup
) -> Run:
    """Data, model, optimizer and folder, loaded where the run goes on."""
    config = plan.config
    assert plan.dtype is not None, "known since the device is"
    assert plan.kernel is not None
    corpus = load_corpus(config.data.data_path)
    _check_same_data(corpus, control)
    rows = split_rows(
        corpus, split=config.data.split, seq_length=config.data.seq_length, seed=config.train.seed
    )
    device = torch.device(device_name, launch.local_rank if device_name == "cuda" else None)
    groups = ParallelGroups.create(plan.grid, device_name)
    model = build_model(
        config, groups, vocab_size=plan.vocab_size, dtype=plan.dtype, device=device
    )
    optimizer = make_optimizer(model.parameters(), config.optimizer)
    if plan.load is not None:
        manifest = load_checkpoint(
            plan.load, model=model, optimizer=optimizer, process_group=control
        )
        _check_continues(plan, manifest, corpus)
    folder = _make_folder(plan, control)
    plan = replace(
        plan, config=replace(config, checkpoint=replace(config.checkpoint, save=str(folder)))
    )
    quiet = launch.rank != 0
    console = Console()
    if not quiet:
        print_start(plan, folder, console)
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        groups=groups,
        cp=ContextParallel(
            groups.cp,
            Mask.causal(plan.row_length),
            layout=plan.layout.kind,
            exchange=config.parallel.cp_comm_type,
            kernel=plan.kernel.name,
        ),
        device=device,
        seed=config.train.seed,
        clip_grad=config.optimizer.clip_grad,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    start = plan.load_step
    return Run(
        plan=plan,
        trainer=trainer,
        rows=rows,
        data_fingerprint=corpus.fingerprint,
        folder=folder,
        control=control,
        writer=None if quiet else MetricsWriter(folder, start_step=start),
        view=ProgressView(
            console, quiet=quiet, start_step=start, train_iters=config.train.train_iters
        ),
    )


def _check_same_data(corpus: Corpus, control: dist.ProcessGroup) -> None:
    """Every rank reads the data itself, so all must have read the same."""
    prints: list[Any] = [None] * control.size()
    dist.all_gather_object(prints, corpus.fingerprint, group=control)
    differing = [rank for rank, found in enumerate(prints) if found != prints[0]]
    if differing:
        rule = f"ranks {differing[:8]} read other data than rank 0"
        raise ConfigError("--data-path", corpus.name, rule, "the same files on every node")


def _check_continues(plan: RunPlan, manifest: Manifest, corpus: Corpus) -> None:
    """The data and the batch must be what the checkpoint was trained on."""
    data = plan.config.data
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
    # Where it lies is not part of it: a folder may be moved.
    lasting = replace(plan.config, checkpoint=replace(checkpoint, save=None, load=None))
    text, file = to_yaml(lasting), folder / CONFIG_FILE
    if file.exists() and file.read_text(encoding="utf-8") != text:
        file.rename(folder / f"config-step-{plan.load_step}.yaml")
    file.write_text(text, encoding="utf-8")
    return str(folder)


def _say_farewell(run: Run, launch: Launch, script: str, last: int, stopped: bool) -> None:
    folder, view = run.folder, run.view
    view.say(f"checkpoint  {step_folder(folder, last)}")
    view.say(f"metrics     {folder / 'metrics.jsonl'}, or: tensorboard --logdir {folder}")
    words = [*launcher(launch), script, "--load", str(folder)]
    if stopped:
        view.say(f"stopped after step {last}; go on with:\n  {shlex.join(words)}")
        return
    more = [*words, "--train-iters", str(2 * run.plan.config.train.train_iters)]
    view.say(f"finished {last} steps; train on with:\n  {shlex.join(more)}")


def launcher(launch: Launch) -> list[str]:
    """The words that start as many ranks again."""
    if not launch.under_torchrun:
        return ["python"]
    words = ["torchrun", "--nproc-per-node", str(launch.local_world_size)]
    if launch.nodes > 1:
        words += ["--nnodes", str(launch.nodes), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", "HOST:PORT"]
    return words
