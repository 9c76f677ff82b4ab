"""Triton kernels on a machine with or without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""A type of few bits. Triton's interpreter does not round to bfloat16: it cuts bits off."""
ROUNDING = torch.finfo(LOW).eps / 2
"""The relative error of one rounding to ``LOW``."""


def triton_file(name: str) -> ModuleType:
    """A file of ``kernels/``; without a GPU it runs in Triton's interpreter, slow and exact."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip(
            "Triton is not installed; it has packages only for Linux on x86-64, where the extra "
            "[test] installs it"
        )
    return importlib.import_module(f"cp_megatron.kernels.{name}")
