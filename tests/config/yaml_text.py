"""A whole configuration from a YAML text, for tests."""

from __future__ import annotations

from cp_megatron.config import Config
from cp_megatron.config.files.presets import DEFAULT_PRESET, PRESETS
from cp_megatron.config.files.yaml_io import overlay, read_values


def from_yaml(text: str, source: str = "test") -> Config:
    """The settings of the text over the preset that it names."""
    values = read_values(text, source)
    return overlay(PRESETS[values.get("preset", DEFAULT_PRESET)], values)
