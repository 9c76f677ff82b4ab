"""How a program's ranks begin: device, process groups, data that all of them read alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
)
from torch.distributed.rendezvous import rendezvous

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.runtime import Launch, set_cublas_workspace
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.read.sources import Corpus
from cp_megatron.data.rows.corpora import Data
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.run_plan import DeviceName, RunPlan

Read = TypeVar("Read", Data, Corpus)


def begin(
    plans: Sequence[RunPlan], launch: Launch
) -> tuple[tuple[RunPlan, ...], DeviceName, dist.ProcessGroup]:
    """Sets this process up and joins the others.

    Args:
        plans: of one grid, model and device; one or more.
        launch: how this process was started.

    Returns:
        the plans on their device, the device, and a group of all ranks for CPU tensors.

    Raises:
        ConfigError: the device is not there, or the kernel does not run on it.
    """
    device, note = _choose_device(plans[0], launch)
    capability = torch.cuda.get_device_capability(launch.local_rank) if device == "cuda" else None
    found = tuple(plan.on_device(device, note, capability) for plan in plans)
    _start_torch(launch, device, deterministic=plans[0].config.train.deterministic)
    return found, device, _connect(plans[0], launch, device)


def make_context(plan: RunPlan, groups: ParallelGroups) -> ContextParallel:
    """Context parallelism of the plan's rows."""
    sequence, parallel = plan.sequence, plan.config.parallel
    assert plan.kernel is not None, "known since the device is"
    return ContextParallel(
        groups.cp,
        sequence.mask,
        layout=sequence.layout.kind,
        exchange="auto" if sequence.exchange == "none" else sequence.exchange,
        kernel=plan.kernel.name,
        route=sequence.route,
        hierarchical_sizes=sequence.sizes,
        deterministic=plan.config.train.deterministic,
        # Masks are a function of the run's rows, alike on every rank that reads them.
        check_ranks="once" if parallel.cp_check_ranks else "never",
    )


def _choose_device(plan: RunPlan, launch: Launch) -> tuple[DeviceName, str]:
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
    """Sets the device of this process up: which GPU, or how many of the node's cores."""
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
    if device == "cuda" and plan.config.memory.optimizer_cpu_offload:
        backend = "cpu:gloo,cuda:nccl"  # the gradients' norm is one of CPU tensors
    options: dict[str, Any] = {"timeout": timeout, "store": _meeting_place(launch, timeout)}
    options |= {"rank": launch.rank, "world_size": launch.world_size}
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


def _meeting_place(launch: Launch, timeout: timedelta) -> Store:
    """The store that the ranks meet in; a life of theirs after a failure has a part of its own.

    torchrun keeps its store from one life to the next where all ranks are on one node, and with it
    the addresses at which the ranks of the life before could be reached.
    """
    if not launch.under_torchrun:
        return HashStore()
    size = launch.world_size
    store, _, _ = next(iter(rendezvous("env://", launch.rank, size, timeout=timeout)))
    return PrefixStore(f"life-{launch.restarts}", store)


def read_alike(control: dist.ProcessGroup, read: Callable[[], Read]) -> Read:
    """Every rank reads the data itself, so all must have read the same; they fail together."""
    found: Read | None = None
    try:
        found = read()
        answer: str | ConfigError = found.fingerprint
    except ConfigError as error:
        answer = error
    answers: list[Any] = [None] * control.size()
    dist.all_gather_object(answers, answer, group=control)
    for other in answers:
        if isinstance(other, ConfigError):
            raise other
    differing = [rank for rank, other in enumerate(answers) if other != answers[0]]
    assert found is not None
    if differing:
        rule = f"ranks {differing[:8]} read other data than rank 0"
        raise ConfigError("--data-path", found.name, rule, "the same files on every node")
    return found
