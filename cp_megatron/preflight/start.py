"""Starts the ranks of a program: device, process groups, model, and data that all ranks read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from cp_megatron.checkpoint.object_collectives import all_gather_objects, on_all_ranks
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.host_heap import keep_freed_memory
from cp_megatron.comm.runtime import Launch, set_cublas_workspace
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.read.corpus import Corpus
from cp_megatron.data.rows.corpora import Data
from cp_megatron.errors import ConfigError
from cp_megatron.model.parallelize import ComputeDType, build_model
from cp_megatron.model.transformer import Transformer
from cp_megatron.preflight.grid_rules import REPLICAS
from cp_megatron.preflight.run_plan import DeviceName, RunPlan

Read = TypeVar("Read", Data, Corpus)


def begin(
    plans: Sequence[RunPlan], launch: Launch
) -> tuple[tuple[RunPlan, ...], DeviceName, dist.ProcessGroup]:
    """Sets this process up and joins the other ranks.

    Args:
        plans: one or more plans of the same grid, model and device.
        launch: how this process was started.

    Returns:
        The plans on their device, the device, and a group of all ranks for CPU tensors.

    Raises:
        ConfigError: the device does not exist, or the kernel does not run on it.
    """
    device, note = choose_device(plans[0].config.train.device, launch.local_world_size)
    capability = torch.cuda.get_device_capability(launch.local_rank) if device == "cuda" else None
    plans = tuple(plan.on_device(device, note, capability) for plan in plans)
    start_torch(launch, device, deterministic=plans[0].config.train.deterministic)
    control = _connect(plans[0], launch, device)
    _check_same_grid(plans[0], launch, control)
    return plans, device, control


def make_model(
    plan: RunPlan, launch: Launch, *, initialize: bool
) -> tuple[Transformer, ParallelGroups, torch.device]:
    """Builds the process groups of the grid and the model on them.

    Args:
        plan: on its device.
        launch: how this process was started.
        initialize: fill in the initial values; not if all values are loaded.

    Returns:
        The sharded model, this rank's groups and its device.
    """
    assert plan.dtype is not None, "known since the device is"
    device = torch.device(f"cuda:{launch.local_rank}" if plan.device == "cuda" else "cpu")
    timeout = timedelta(minutes=plan.config.parallel.distributed_timeout_minutes)
    has_experts = bool(plan.config.model.expert_layers)
    groups = ParallelGroups.create(plan.grid, device.type, timeout, has_experts=has_experts)
    model = build_model(
        plan.config,
        groups,
        vocab_size=plan.vocab_size,
        dtype=cast(ComputeDType, plan.dtype),
        device=device,
        initialize=initialize,
        chunks=plan.stages.of(groups.coordinates.pp),
    )
    return model, groups, device


def make_context(plan: RunPlan, groups: ParallelGroups) -> ContextParallel:
    """Context parallelism for the plan's rows."""
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
        exchange_latent=parallel.cp_latent_exchange,
        message_parts=sequence.message_parts,
        rates=sequence.rates,
        deterministic=plan.config.train.deterministic,
        # Masks follow from the run's rows, which are the same on every rank that reads them.
        check_ranks="once" if parallel.cp_check_ranks else "never",
    )


def choose_device(asked: str, num_ranks: int) -> tuple[DeviceName, str]:
    """cuda if each of a node's ranks has a GPU of its own, else cpu; and a note about the choice.

    Raises:
        ConfigError: ``--device cuda`` with fewer GPUs than local ranks.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and num_gpus < num_ranks:
        rule = f"{num_ranks} ranks on this node need a GPU each, and it has {num_gpus}"
        works = f"--nproc-per-node {num_gpus}, or --device cpu" if num_gpus else "--device cpu"
        raise ConfigError("--device", asked, rule, works)
    if asked == "cpu" or num_gpus == 0:
        return "cpu", ""
    if num_gpus < num_ranks:
        return "cpu", f"{num_ranks} ranks and {num_gpus} GPUs on this node: CPU and gloo"
    return "cuda", ""


def start_torch(launch: Launch, device: DeviceName, *, deterministic: bool) -> None:
    """Selects this process's GPU, or its share of the node's cores."""
    if device == "cuda":
        if deterministic:
            set_cublas_workspace()
            torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(launch.local_rank)
        return
    keep_freed_memory()
    # torchrun sets one thread per rank on any machine. Divide the cores among the ranks instead.
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // launch.local_world_size))


def _connect(plan: RunPlan, launch: Launch, device: DeviceName) -> dist.ProcessGroup:
    """Joins the other ranks; returns a group of all of them for CPU tensors and objects."""
    timeout = timedelta(minutes=plan.config.parallel.distributed_timeout_minutes)
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda" and plan.config.memory.optimizer_cpu_offload:
        backend = "cpu:gloo,cuda:nccl"  # the gradients, and so their norm, are on the CPU
    options: dict[str, Any] = {"timeout": timeout, "store": _rendezvous_store(launch, timeout)}
    options |= {"rank": launch.rank, "world_size": launch.world_size}
    if device == "cuda":
        options["device_id"] = torch.device("cuda", launch.local_rank)
    dist.init_process_group(backend, **options)
    on_cpu = device == "cpu"
    control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=timeout)
    assert control is not None
    return control


def _check_same_grid(plan: RunPlan, launch: Launch, control: dist.ProcessGroup) -> None:
    """Compares the grids that ranks have chosen by the size of their node.

    Raises:
        ConfigError: they differ, because flags or the numbers of ranks on nodes do.
    """
    found = all_gather_objects((launch.local_world_size, repr(plan.grid)), control)
    numbers, grids = zip(*found)
    if len(set(grids)) > 1:
        asked = plan.config.parallel.data_parallel_replicate_size
        shown = ", ".join(map(str, sorted(set(numbers))))
        rule = f"ranks plan different grids, on nodes of {shown} ranks"
        works = f"{REPLICAS} 1, or the same flags and as many ranks on every node"
        raise ConfigError(REPLICAS, asked, rule, works)


def _rendezvous_store(launch: Launch, timeout: timedelta) -> Store:
    """The store through which the ranks find each other, with a prefix for each restart.

    If all ranks are on one node, torchrun keeps its store after a restart, and with it the outdated
    addresses of the ranks before the restart.
    """
    if not launch.under_torchrun:
        return HashStore()
    size = launch.world_size
    store, _, _ = next(iter(rendezvous("env://", launch.rank, size, timeout=timeout)))
    return PrefixStore(f"restart-{launch.restarts}", store)


def read_and_compare(control: dist.ProcessGroup, read: Callable[[], Read]) -> Read:
    """Reads the data on every rank, and checks that all ranks read the same.

    Raises:
        ConfigError: a rank cannot read the data, or the data differ; the same on every rank.
    """
    data = on_all_ranks(read, control)
    fingerprints = all_gather_objects(data.fingerprint, control)
    differing = [rank for rank, other in enumerate(fingerprints) if other != fingerprints[0]]
    if differing:
        rule = f"ranks {differing[:8]} read different data from rank 0"
        raise ConfigError("--data-path", data.name, rule, "the same files on every node")
    return data
