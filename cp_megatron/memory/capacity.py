"""What can be found out beside the flags: room on the disk and in memory, an exchange that fits.

No torch: before a run what forbids it, and in a dry run everything in words.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.files.run_folders import RUNS
from cp_megatron.errors import ConfigError
from cp_megatron.memory import predict as kinds
from cp_megatron.memory.exchange_buffers import schedules
from cp_megatron.memory.predict import predict
from cp_megatron.plan.rehearsal import rehearse
from cp_megatron.preflight.run_plan import DeviceName, RunPlan
from cp_megatron.spec.parameter_table import num_parameters

_MEMORY_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_NVIDIA = Path("/dev/nvidiactl")
_MOMENTS = 2
GIB = 2**30


def checkpoint_bytes(plan: RunPlan) -> int:
    """Bytes of one checkpoint of all ranks: parameters and two moments of each."""
    sizes = {"vocab_size": plan.padded_vocab_size, "seq_length": plan.config.data.seq_length}
    element = 8 if plan.dtype == "float64" else 4
    return num_parameters(plan.config.model, **sizes) * element * (1 + _MOMENTS)


def check_disk(plan: RunPlan, *, elsewhere: bool = False) -> str:
    """How much checkpoints take of the disk under ``--save``, in words.

    Args:
        plan: the run.
        elsewhere: it will be on another machine.

    Raises:
        ConfigError: not one checkpoint fits, on this machine.
    """
    folder = Path(plan.config.checkpoint.save or RUNS)
    free, needed = _free_bytes(folder), checkpoint_bytes(plan)
    room = f"a checkpoint takes {_gib(needed)}, {_gib(free)} are free"
    if elsewhere:
        return f"disk: {room} here"
    if needed > free:
        raise ConfigError("--save", folder, room, "a folder on a larger disk, or a smaller model")
    kept = _kept_at_once(plan.config, plan.load_step)
    if needed * kept > free:
        works = f"--keep-latest-k {max(1, free // needed - 1)}"
        return f"disk: {room}: {kept} of them will not fit (works: {works})"
    return f"disk: {room}"


def _kept_at_once(config: Config, first_step: int) -> int:
    """Checkpoints that will lie in the folder, the one being written included."""
    train, checkpoint = config.train, config.checkpoint
    every = checkpoint.save_interval
    saves = 1 if every is None else -(-(train.train_iters - first_step) // every)
    if checkpoint.keep_latest_k is None:
        return saves
    retained = checkpoint.save_retain_interval
    more = 0 if retained is None else (train.train_iters - first_step) // retained
    return min(saves, checkpoint.keep_latest_k + 1 + more)


def _free_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_memory(plan: RunPlan, *, num_ranks: int, total_bytes: int | None) -> str:
    """How much the ranks that share a memory will hold, in words.

    Args:
        plan: the run, on its device.
        num_ranks: that share it.
        total_bytes: of the memory; None where that is not known.

    Raises:
        ConfigError: they will hold more than there is.
    """
    needed = _least_bytes(plan) * num_ranks
    ranks = "a rank holds" if num_ranks == 1 else f"{num_ranks} ranks hold"
    found = f"{ranks} {_gib(needed)} at least on {plan.device} in a step"
    if total_bytes is None:
        return found
    found += f", there are {_gib(total_bytes)}"
    if needed > total_bytes:
        works = "more ranks with a larger --context-parallel-size, --recompute-granularity full"
        raise ConfigError("--device", plan.device, found, works)
    return found


def look_around(plan: RunPlan, launch: Launch, *, dry_run: bool) -> RunPlan:
    """The plan with what a person should know of this machine, and of a first exchange.

    Args:
        plan: the run.
        launch: how this process was started.
        dry_run: nothing is trained, and where the run will be is not known.

    Raises:
        ConfigError: what was planned does not fit here.
    """
    elsewhere = dry_run and not launch.under_torchrun
    disk = check_disk(plan, elsewhere=elsewhere and plan.config.checkpoint.save is None)
    if elsewhere:
        notes = [disk, *(f"memory: {_of_one_rank(plan, device)}" for device in plan.kernels)]
    else:
        notes = [disk] if dry_run or "not fit" in disk else []
        # A GPU's memory is asked for when torch is there.
        if plan.device == "cpu" or (plan.device is None and not _NVIDIA.exists()):
            here = plan.on_device("cpu")
            total, num_ranks = machine_bytes(), launch.local_world_size
            found = check_memory(here, num_ranks=num_ranks, total_bytes=total)
            notes += [f"memory: {found}"] if dry_run else []
    notes += _rehearsed(plan) if dry_run else []
    return dataclasses.replace(plan, notes=(*plan.notes, *notes))


def _rehearsed(plan: RunPlan) -> list[str]:
    """That the ranks expect of each other what is sent (plan/rehearsal.py)."""
    found = [rehearse(schedule) for schedule in schedules(plan)]
    if not found:
        return []
    size, seen = plan.grid.cp, found[0].num_ranks
    ranks = f"{size} ranks" if seen == size else f"{seen} of {size:,} ranks"
    count = sum(one.num_messages for one in found)
    return [f"exchange: rehearsed for {ranks}: {count:,} messages are what their receivers expect"]


def _of_one_rank(plan: RunPlan, device: DeviceName) -> str:
    on_device = plan if plan.device is not None else plan.on_device(device)
    return check_memory(on_device, num_ranks=1, total_bytes=None)


def _least_bytes(plan: RunPlan) -> int:
    """What rank 0, which has the largest share, holds at some moment of its second step.

    Activations are let go as the gradients come, so that only where micro batches are accumulated
    both are there at once. What waits on the host, or in files, takes none of the device's memory.
    """
    held: Counter[str] = Counter()
    for row in predict(plan, 0):
        if row.detail != kinds.HOST and row.kind != kinds.HOST:
            held[row.kind] += row.num_bytes
    forward = held[kinds.GATHERED] + held[kinds.ACTIVATIONS]
    gradients = held[kinds.GRADIENTS]
    together = forward + gradients if plan.num_microbatches > 1 else max(forward, gradients)
    return held[kinds.PARAMETERS] + held[kinds.OPTIMIZER] + together


def machine_bytes() -> int | None:
    """Memory that processes here may use, whole machine or container; None where it is not told."""
    return min(_limits(), default=None)


def _limits() -> Iterator[int]:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in _MEMORY_FILES:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            yield int(text)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
