"""Chooses the checkpoint that ``--load`` names. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cp_megatron.checkpoint.manifest import (
    FLAG,
    DamagedError,
    Manifest,
    check_size,
    read_manifest,
)
from cp_megatron.checkpoint.step_folders import newest_step, step_folders
from cp_megatron.config.files.run_folders import run_folder
from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Newest:
    """The checkpoint to continue from.

    Attributes:
        folder: a ``step-N``.
        manifest: the manifest of this checkpoint.
        passed_over: newer checkpoints that are damaged, and what is wrong with them.
    """

    folder: Path
    manifest: Manifest
    passed_over: Mapping[Path, str] = field(default_factory=dict)


def newest_whole(run_folder: Path, before: int | None = None) -> Newest | None:
    """Finds the newest checkpoint with a valid manifest and shards of the right sizes.

    The contents of the shards are not read.

    Args:
        run_folder: the run's folder.
        before: consider only checkpoints of fewer steps.

    Returns:
        None if the folder has no checkpoint at all.

    Raises:
        DamagedError: all checkpoints are damaged; the error describes the newest.
    """
    steps = step_folders(run_folder)
    passed_over: dict[Path, str] = {}
    first: DamagedError | None = None
    for step in sorted(steps, reverse=True):
        if before is not None and step >= before:
            continue
        folder = steps[step]
        try:
            manifest = read_manifest(folder)
            for name, entry in manifest.files.items():
                check_size(folder, name, entry)
        except DamagedError as error:
            first = first or error
            passed_over[folder] = error.rule
            continue
        return Newest(folder=folder, manifest=manifest, passed_over=passed_over)
    if first is not None:
        raise first
    return None


def named_step(load: Path) -> Path:
    """Returns ``load`` if it is a ``step-N``, else the newest checkpoint of the run's folder.

    The contents of the checkpoint are not read.

    Raises:
        ConfigError: the folder has no checkpoint.
    """
    step = newest_step(load) if run_folder(load) == load else load
    if step is None:
        rule = "holds no finished checkpoint (step-N)"
        raise ConfigError(FLAG, load, rule, _saved_runs(load) or "a run's folder, or its step-N")
    return step


def _saved_runs(path: Path) -> str:
    """Lists the runs next to ``path`` that have a checkpoint."""
    runs = [other for other in sorted(path.parent.glob("*")) if other.is_dir()]
    return ", ".join(str(run) for run in runs if newest_step(run) is not None)
