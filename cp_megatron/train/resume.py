"""Which checkpoint a run really goes on from: the same on all ranks, every byte of it whole.

A damaged checkpoint is passed over for the newest whole one, and a person is told. In the run's own
folder it is renamed to ``step-N.damaged``: its step will be trained and saved again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from cp_megatron.checkpoint.find_checkpoint import Newest, newest_whole
from cp_megatron.checkpoint.manifest import DamagedError, read_manifest, verify_files
from cp_megatron.checkpoint.object_collectives import (
    all_gather_objects,
    broadcast_object,
    on_all_ranks,
)
from cp_megatron.checkpoint.step_folders import set_aside
from cp_megatron.config.files.run_folders import run_folder
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.run_plan import RunPlan


def settle_load(plan: RunPlan, control: dist.ProcessGroup) -> RunPlan:
    """The plan with the checkpoint that it goes on from, verified. Called on every rank.

    Args:
        plan: what each rank found by itself.
        control: a group of all ranks for CPU tensors.

    Raises:
        ConfigError: the ranks see different checkpoints, or none is whole; on every rank alike.
    """
    seen = all_gather_objects(plan.load, control)
    differing = [rank for rank, load in enumerate(seen) if load != seen[0]]
    if differing:
        rule = f"ranks {differing[:8]} see {seen[differing[0]]}, rank 0 {seen[0]}"
        raise ConfigError("--load", plan.config.checkpoint.load, rule, "a folder all nodes share")
    if plan.load is None:
        return plan
    named = str(plan.config.checkpoint.load)
    passed_over = dict(plan.passed_over)
    found = Newest(folder=plan.load, manifest=read_manifest(plan.load))
    while (error := _damage(found, control)) is not None:
        if run_folder(Path(named)) != Path(named):  # who names a step means it
            raise error
        passed_over[found.folder] = error.rule
        found = _older(found, error, control)
        passed_over |= found.passed_over
    notes = [
        f"{folder.name} is passed over: it {rule}{_set_aside(folder, plan, control)}"
        for folder, rule in sorted(passed_over.items())
    ]
    return replace(
        plan,
        load=found.folder,
        load_step=found.manifest.step,
        passed_over=passed_over,
        notes=(*plan.notes, *notes),
    )


def _damage(found: Newest, control: dist.ProcessGroup) -> DamagedError | None:
    """What is wrong with its shards; each rank reads its share of them."""
    names = sorted(found.manifest.files)[control.rank() :: control.size()]

    def verify() -> bool:
        verify_files(found.folder, found.manifest, names)
        return True

    try:
        on_all_ranks(verify, control)
    except DamagedError as error:
        return error
    return None


def _older(found: Newest, error: DamagedError, control: dist.ProcessGroup) -> Newest:
    """The newest whole one before it; ``error`` where there is none."""

    def find() -> Newest:
        older = newest_whole(found.folder.parent, before=found.manifest.step)
        if older is None:
            raise error
        return older

    return on_all_ranks(find, control)


def _set_aside(folder: Path, plan: RunPlan, control: dist.ProcessGroup) -> str:
    """Renames it where this run will save, and says so. By rank 0."""
    save, told = plan.config.checkpoint.save, ""
    if save is None or folder.parent.resolve() != Path(save).resolve():
        return told
    if control.rank() == 0:
        try:
            told = f"; kept as {set_aside(folder).name}"
        except OSError as error:
            told = f"; it can not be renamed ({error.strerror})"
    return str(broadcast_object(told, control))
