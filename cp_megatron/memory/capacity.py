"""Checks before a run that its checkpoints fit on the disk and its step fits in memory.

This module does not import torch. Before a run it refuses what does not fit; in a dry run it
describes the space that is needed, and rehearses the exchange.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from cp_megatron.comm.runtime import Launch
from cp_megatron.config import CheckpointConfig
from cp_megatron.config.files.run_folders import RUNS
from cp_megatron.errors import ConfigError
from cp_megatron.memory.predict import schedules
from cp_megatron.memory.stage_notes import stage_needs
from cp_megatron.plan import Grid
from cp_megatron.plan.grid import STAGE
from cp_megatron.plan.rehearsal import rehearse
from cp_megatron.preflight.grid_rules import REPLICAS
from cp_megatron.preflight.run_plan import RunPlan

_CGROUP = Path("/sys/fs/cgroup")
_NVIDIA = Path("/dev/nvidiactl")
GIB = 2**30


def checkpoint_bytes(plan: RunPlan) -> int:
    """Returns the bytes of one checkpoint on all ranks: parameters and their two moments."""
    element = 8 if plan.dtype == "float64" else 4
    return 3 * element * plan.spec.num_parameters()


def check_disk(plan: RunPlan, *, other_machine: bool = False) -> str:
    """Describes how much space checkpoints need under ``--save``.

    Args:
        plan: the run.
        other_machine: whether the run will be on another machine, so that this one's disk counts
            for nothing.

    Raises:
        ConfigError: not even one checkpoint fits on this machine.
    """
    folder = Path(plan.config.checkpoint.save or RUNS)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, checkpoint_bytes(plan)
    space = f"a checkpoint takes {_gib(needed)}, {_gib(free)} are free"
    if other_machine:
        few = ", which is too few if the run is on this machine" if needed > free else ""
        return f"disk: {space} here{few}"
    if needed > free:
        raise ConfigError("--save", folder, space, "a folder on a larger disk, or a smaller model")
    kept = _kept_at_once(plan.config.checkpoint, plan.last_step - plan.load_step)
    if needed * kept > free:
        works = f"--keep-latest-k {max(1, free // needed - 1)}"
        return f"disk: {space}: {kept} of them will not fit (works: {works})"
    return f"disk: {space}"


def _kept_at_once(checkpoint: CheckpointConfig, num_steps: int) -> int:
    """Returns the largest number of checkpoints in the folder, including the one being written."""
    every = checkpoint.save_interval
    saves = 1 if every is None else -(-num_steps // every)
    if checkpoint.keep_latest_k is None:
        return saves
    retained = checkpoint.save_retain_interval
    more = 0 if retained is None else num_steps // retained
    return min(saves, checkpoint.keep_latest_k + 1 + more)


def check_memory(plan: RunPlan, *, num_ranks: int, total_bytes: int | None) -> str:
    """Describes how much memory a step needs on ranks that share a device or a machine.

    Args:
        plan: the run, on its device.
        num_ranks: the number of ranks that share the memory.
        total_bytes: the size of the memory; None if it is unknown.

    Raises:
        ConfigError: the ranks need more memory than there is.
    """
    needed = _least_of_several(plan, num_ranks)
    ranks = "a rank holds" if num_ranks == 1 else f"{num_ranks} ranks hold"
    space = f"{ranks} {_gib(needed)} at least on {plan.device} in a step"
    if total_bytes is None:
        return space
    space += f", there are {_gib(total_bytes)}"
    if needed > total_bytes:
        works = "more ranks with a larger --context-parallel-size, --recompute-granularity full"
        if plan.grid.replicas > 1 and _least_of_several(_one_copy(plan), num_ranks) <= total_bytes:
            works = f"{REPLICAS} 1"
        raise ConfigError("--device", plan.device, space, works)
    return space


def fitting(plan: RunPlan, *, num_ranks: int, total_bytes: int | None) -> tuple[RunPlan, str]:
    """The plan, or one without the copies of the model that ``auto`` chose, if only that fits; and
    what ``check_memory`` says of it.

    Args:
        plan, num_ranks, total_bytes: as for ``check_memory``.

    Raises:
        ConfigError: the ranks need more memory than there is in any case.
    """
    auto = plan.config.parallel.data_parallel_replicate_size == "auto"
    if auto and plan.grid.replicas > 1 and total_bytes is not None:
        needed = _least_of_several(plan, num_ranks)
        if needed > total_bytes:
            plan = _one_copy(plan)
            note = "weights are sharded over all nodes, not copied to each: with copies, a step "
            note += (
                f"takes {_gib(needed)} at least, there are {_gib(total_bytes)} ({REPLICAS} auto)"
            )
            others = (x for x in plan.notes if not x.endswith(f"({REPLICAS} auto)"))
            plan = dataclasses.replace(plan, notes=(*others, note))
    return plan, check_memory(plan, num_ranks=num_ranks, total_bytes=total_bytes)


def _one_copy(plan: RunPlan) -> RunPlan:
    sizes: dict[str, Any] = plan.grid.sizes
    return dataclasses.replace(plan, grid=Grid(ep=plan.grid.ep, **sizes))


def _least_of_several(plan: RunPlan, num_ranks: int) -> int:
    """Returns what ``num_ranks`` neighbours need at least, those that need the most."""
    needs = [need for need in stage_needs(plan) for _ in range(plan.grid.size(STAGE))]
    return max(sum(needs[at : at + num_ranks]) for at in range(0, len(needs), num_ranks))


def check_capacity(plan: RunPlan, launch: Launch, *, dry_run: bool) -> RunPlan:
    """Checks disk and memory of this machine, and returns the plan with notes about them.

    Args:
        plan: the run.
        launch: how this process was started.
        dry_run: whether nothing is trained; without torchrun the run will be on another machine.

    Raises:
        ConfigError: the run does not fit on this machine.
    """
    other_machine = dry_run and not launch.under_torchrun
    # A run of one rank may well be on this machine, in the folder that the user names.
    several = plan.grid.world_size != launch.world_size or plan.config.checkpoint.save is None
    disk = check_disk(plan, other_machine=other_machine and several)
    if other_machine:
        plans = [plan] if plan.device else map(plan.on_device, plan.kernels)
        needs = [check_memory(each, num_ranks=1, total_bytes=None) for each in plans]
        notes = [disk, *(f"memory: {need}" for need in needs)]
    else:
        notes = [disk] if dry_run or "not fit" in disk else []
        # The memory of a GPU is checked later, when torch is imported.
        if plan.device == "cpu" or (plan.device is None and not _NVIDIA.exists()):
            num_ranks, total = launch.local_world_size, machine_bytes()
            on_cpu, memory = fitting(plan.on_device("cpu"), num_ranks=num_ranks, total_bytes=total)
            if on_cpu.grid != plan.grid:
                plan = dataclasses.replace(plan, grid=on_cpu.grid, notes=on_cpu.notes)
            notes += [f"memory: {memory}"] if dry_run else []
    notes += _rehearsed(plan) if dry_run else []
    return dataclasses.replace(plan, notes=(*plan.notes, *notes))


def _rehearsed(plan: RunPlan) -> list[str]:
    """Checks that every rank receives the messages that it expects (plan/rehearsal.py)."""
    rehearsals = [rehearse(schedule) for schedule in schedules(plan)]
    if not rehearsals:
        return []
    size, seen = plan.grid.cp, rehearsals[0].num_ranks
    ranks = f"{size} ranks" if seen == size else f"{seen} of {size:,} ranks"
    count = sum(rehearsal.num_messages for rehearsal in rehearsals)
    checked = f"exchange: checked {count:,} messages between {ranks}"
    return [f"{checked}; each matches what its receiver expects"]


def machine_bytes() -> int | None:
    """Returns the memory limit of this machine or container in bytes, or None if it is unknown."""
    limits = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # the file can say "max"
            limits.append(int(file.read_text()))
    return min(limits, default=None)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
