"""What a rank loads before its first step: every module costs each rank of a node its time."""

from __future__ import annotations

import subprocess
import sys

LATER = (
    "datasets",
    "matplotlib",
    "pandas",
    "pyarrow",
    "scipy",
    "sentencepiece",
    "tensorboard",
    "tokenizers",
    "torch._inductor.compile_fx",
    "transformers",
    "wandb",
)
"""Modules that only some runs need, or only rank 0; they are imported where they are used."""
CODE = """
import sys
import cp_megatron.train.run
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_a_run_is_loaded_without_what_its_first_step_does_not_need() -> None:
    words = [sys.executable, "-c", CODE, *LATER]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
