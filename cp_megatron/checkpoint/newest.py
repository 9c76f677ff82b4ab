"""The newest checkpoint of a run that is whole, and those that had to be passed over. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cp_megatron.checkpoint.manifest import (
    FLAG,
    DamagedError,
    Manifest,
    check_size,
    newest_step,
    read_manifest,
    step_folders,
)
from cp_megatron.config.files.run_folders import run_folder
from cp_megatron.errors import ConfigError

DAMAGED = ".damaged"


@dataclass(frozen=True, kw_only=True)
class Newest:
    """A checkpoint to go on from.

    Attributes:
        folder: a ``step-N``.
        manifest: of it.
        passed_over: newer ones that are damaged, and what is wrong with them.
    """

    folder: Path
    manifest: Manifest
    passed_over: Mapping[Path, str] = field(default_factory=dict)


def newest_whole(run_folder: Path, before: int | None = None) -> Newest | None:
    """The newest checkpoint whose manifest can be trusted and whose shards have their sizes.

    Contents of shards are not read.

    Args:
        run_folder: the run's folder.
        before: only checkpoints of fewer steps.

    Returns:
        None where the folder has no checkpoint at all.

    Raises:
        DamagedError: all of them are damaged; what it says of the newest.
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
    """The ``step-N`` that ``--load`` names: it, or the newest of a run's folder. Contents unread.

    Raises:
        ConfigError: the folder has none.
    """
    step = newest_step(load) if run_folder(load) == load else load
    if step is None:
        rule = "holds no finished checkpoint (step-N)"
        raise ConfigError(FLAG, load, rule, _saved_runs(load) or "a run's folder, or its step-N")
    return step


def _saved_runs(path: Path) -> str:
    """The runs beside it that have a checkpoint."""
    runs = [other for other in sorted(path.parent.glob("*")) if other.is_dir()]
    return ", ".join(str(run) for run in runs if newest_step(run) is not None)


def set_aside(folder: Path) -> Path:
    """Renames a damaged ``step-N`` to ``step-N.damaged``, or the next free name.

    Its step will be trained and saved again under the old name.

    Raises:
        OSError: as the file system does.
    """
    aside, number = folder.with_name(folder.name + DAMAGED), 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_name(f"{folder.name}{DAMAGED}.{number}")
    return folder.rename(aside)
