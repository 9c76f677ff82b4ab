"""The configuration of a run: dataclasses, flags, presets and YAML. It does not import torch."""

from cp_megatron.config.schema import *  # noqa: F403
