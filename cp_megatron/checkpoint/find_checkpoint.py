"""Chooses the checkpoint that ``--load`` names, and reads the configuration in it.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cp_megatron.checkpoint.manifest import FLAG, DamagedError, Manifest, check_size, read_manifest
from cp_megatron.checkpoint.step_folders import newest_step, step_folders
from cp_megatron.config import Config
from cp_megatron.config.fields import settings
from cp_megatron.config.files.run_folders import run_folder
from cp_megatron.config.files.yaml_io import overlay
from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointChoice:
    """The checkpoint ``step-N`` to continue from, and newer damaged ones with what is wrong."""

    folder: Path
    manifest: Manifest
    passed_over: Mapping[Path, str] = field(default_factory=dict)


def newest_intact(run_folder: Path, before: int | None = None) -> CheckpointChoice | None:
    """Finds the newest checkpoint with a valid manifest and shards of the right sizes.

    The contents of the shards are not read. With ``before``, only checkpoints of fewer steps are
    considered. If there is none at all, the result is None.

    Raises:
        DamagedError: all checkpoints are damaged; the error describes the newest.
    """
    passed_over: dict[Path, str] = {}
    first: DamagedError | None = None
    for step, folder in sorted(step_folders(run_folder).items(), reverse=True):
        if before is not None and step >= before:
            continue
        try:
            manifest = read_manifest(folder)
            for name, entry in manifest.files.items():
                check_size(folder, name, entry)
            return CheckpointChoice(folder=folder, manifest=manifest, passed_over=passed_over)
        except DamagedError as error:
            first = first or error
            passed_over[folder] = error.rule
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


def saved_config(manifest: Manifest, source: Path | str) -> Config:
    """Returns the model and data settings in a manifest, and defaults for everything else.

    Settings that a later version of the program added have their defaults, too.

    Raises:
        ConfigError: the manifest does not describe a model; it names ``source``.
    """
    values: dict[str, Any] = {}
    try:
        for row in settings().values():
            entries = manifest.config[row.section] if row.section in ("model", "data") else {}
            if row.name in entries:
                values[row.name] = row.from_yaml(entries[row.name])
        return overlay(Config(), values)
    except (KeyError, TypeError, ValueError) as error:
        rule = f"its manifest does not describe a model: {error}"
        raise ConfigError(FLAG, source, rule, "another step") from None
