"""Decides which checkpoint a run continues from: the same on all ranks, with all files verified.

If a checkpoint is damaged, the newest intact one before it is used instead, and a note in the start
table says so. In the run's own folder, the damaged one is renamed to ``step-N.damaged``, because
its step will be trained and saved again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from cp_megatron.checkpoint.find_checkpoint import CheckpointChoice, newest_intact
from cp_megatron.checkpoint.manifest import DamagedError, read_manifest, verify_files
from cp_megatron.checkpoint.object_collectives import (
    all_gather_objects,
    on_all_ranks,
    on_first_rank,
)
from cp_megatron.checkpoint.step_folders import set_aside
from cp_megatron.config.files.run_folders import run_folder
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.run_length import continued_from, with_last_step
from cp_megatron.preflight.run_plan import RunPlan


def verify_load(plan: RunPlan, control: dist.ProcessGroup) -> RunPlan:
    """The plan with a verified checkpoint. Call it on every rank.

    Args:
        plan: the plan that this rank made by itself.
        control: a group of all ranks for CPU tensors.

    Raises:
        ConfigError: the ranks see different checkpoints, or none is intact; the same on every rank.
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
    newest = CheckpointChoice(folder=plan.load, manifest=read_manifest(plan.load))
    while (error := _damage(newest, control)) is not None:
        if run_folder(Path(named)) != Path(named):  # the user named this very step
            raise error
        passed_over[newest.folder] = error.rule
        newest = _older(newest, error, control)
        passed_over |= newest.passed_over
    notes = [
        f"{folder.name} is passed over: it {rule}{_set_aside(folder, plan, control)}"
        for folder, rule in sorted(passed_over.items())
    ]
    plan = with_last_step(continued_from(plan, newest.folder, newest.manifest))
    return replace(plan, passed_over=passed_over, notes=(*plan.notes, *notes))


def _damage(checkpoint: CheckpointChoice, control: dist.ProcessGroup) -> DamagedError | None:
    """The damage of a checkpoint's files, if any; each rank verifies its share of them."""
    names = sorted(checkpoint.manifest.files)[control.rank() :: control.size()]
    try:
        on_all_ranks(lambda: verify_files(checkpoint.folder, checkpoint.manifest, names), control)
    except DamagedError as error:
        return error
    return None


def _older(
    damaged: CheckpointChoice, error: DamagedError, control: dist.ProcessGroup
) -> CheckpointChoice:
    """The newest intact checkpoint before a damaged one; raises ``error`` if there is none."""

    def find() -> CheckpointChoice:
        older = newest_intact(damaged.folder.parent, before=damaged.manifest.step)
        if older is None:
            raise error
        return older

    return on_all_ranks(find, control)


def _set_aside(folder: Path, plan: RunPlan, control: dist.ProcessGroup) -> str:
    """Renames a damaged checkpoint in the folder of this run, on rank 0; returns a note."""
    save = plan.config.checkpoint.save
    if save is None or folder.parent.resolve() != Path(save).resolve():
        return ""

    def rename() -> str:
        try:
            return f"; kept as {set_aside(folder).name}"
        except OSError as error:
            return f"; it cannot be renamed ({error.strerror})"

    return on_first_rank(rename, control)
