"""Reads the configuration of the run that wrote a checkpoint. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cp_megatron.checkpoint.manifest import FLAG, Manifest
from cp_megatron.config import Config
from cp_megatron.config.fields import settings
from cp_megatron.config.yaml_io import overlay
from cp_megatron.errors import ConfigError


def saved_config(
    manifest: Manifest, source: Path | str, *, check: Callable[[Config], object] | None = None
) -> Config:
    """Returns the model and data settings in a manifest, and defaults for everything else.

    Settings that a later version of the program added have their defaults, too.

    Args:
        manifest: the manifest of a checkpoint.
        source: the checkpoint, for errors.
        check: raises ConfigError for a configuration that is not possible.

    Raises:
        ConfigError: the manifest does not describe a model.
    """
    values: dict[str, Any] = {}
    try:
        for row in settings().values():
            entries = manifest.config[row.section] if row.section in ("model", "data") else {}
            if row.name in entries:
                values[row.name] = row.from_yaml(entries[row.name])
        config = overlay(Config(), values)
        if check is not None:
            check(config)
    except (KeyError, TypeError, ValueError) as error:
        rule = f"its manifest does not describe a model: {error}"
        raise ConfigError(FLAG, source, rule, "another step") from None
    return config
