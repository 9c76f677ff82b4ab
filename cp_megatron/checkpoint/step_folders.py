"""The folders ``step-N`` of a run, by their names alone. This module does not import torch.

A checkpoint is a folder ``step-N`` with a manifest and shards. While it is written it is called
``step-N.tmp``; it is renamed when every byte of it is on the disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from cp_megatron.config.files.run_folders import STEP_FOLDER

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"


def step_folder(run_folder: Path, step: int) -> Path:
    """Returns the folder of a run's checkpoint of one step."""
    return run_folder / f"step-{step}"


def temporary_folder(step_folder: Path) -> Path:
    """Returns the name of a checkpoint's folder while it is written or removed."""
    return step_folder.with_name(step_folder.name + TEMPORARY)


def newest_step(run_folder: Path | str) -> Path | None:
    """Returns the finished checkpoint with the most steps in a run's folder, or None."""
    steps = finished_steps(Path(run_folder))
    return steps[max(steps)] if steps else None


def finished_steps(run_folder: Path) -> dict[int, Path]:
    """Returns the checkpoints of a run's folder that have a manifest, by their steps."""
    steps = step_folders(run_folder)
    return {step: folder for step, folder in steps.items() if (folder / MANIFEST).is_file()}


def step_folders(run_folder: Path) -> dict[int, Path]:
    """Returns everything that is called ``step-N`` in a run's folder, by its step."""
    matches = {entry: STEP_FOLDER.fullmatch(entry.name) for entry in _entries(run_folder)}
    return {int(match[1]): entry for entry, match in matches.items() if match}


def unfinished_steps(run_folder: Path) -> list[Path]:
    """Returns every ``step-N.tmp`` of a run's folder, left there by saves that did not finish."""
    return [
        entry
        for entry in _entries(run_folder)
        if entry.name.endswith(TEMPORARY)
        and STEP_FOLDER.fullmatch(entry.name.removesuffix(TEMPORARY))
    ]


def set_aside(folder: Path) -> Path:
    """Renames a damaged ``step-N`` to ``step-N.damaged``, or to the next free name.

    The run will train this step again and save it under the old name.

    Raises:
        OSError: the folder cannot be renamed.
    """
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged.{number}")
    return folder.rename(aside)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
