"""Reads the configuration of the run that wrote a checkpoint. This module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cp_megatron.checkpoint.manifest import FLAG, Manifest
from cp_megatron.config import Config
from cp_megatron.config.fields import settings
from cp_megatron.config.files.yaml_io import overlay
from cp_megatron.errors import ConfigError


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
