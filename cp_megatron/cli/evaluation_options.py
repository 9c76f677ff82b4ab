"""The flags of ``launch/evaluate.py``, beside those of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cp_megatron.cli.parse import LaunchOptions, Program
from cp_megatron.config.ranges import LARGEST_SIZE, Range, Size

Part = Literal["train", "valid", "test", "all"]

TASKS = ("perplexity", "needle", "variables")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(LaunchOptions):
    """What is asked of the model."""

    tasks: tuple[str, ...] = TASKS
    """perplexity (by position), needle (a number to find again), variables (a chain to follow)."""
    lengths: tuple[Annotated[int, Range(2, LARGEST_SIZE)], ...] = (512, 2048, 8192)
    """Tokens of a row, one column of the results each."""
    num_samples: Size = 8
    """Rows per length; of needle, per length and depth."""
    buckets: Annotated[int, Range(1, 32)] = 8
    """Buckets of positions of the perplexity; each is twice as long as the one before."""
    depths: tuple[Annotated[int, Range(0, 100)], ...] = (0, 25, 50, 75, 100)
    """Where in the text the needle lies, in percent."""
    part: Part | None = None
    """Part of the data, as --split cuts it; by default all where --data-path is given, else what
    the run validated on."""
    output: str = "evaluation"
    """A new folder for results.json and the pictures."""


EVALUATE = Program(
    name="evaluate.py",
    description="""Evaluate a trained transformer on long rows over any grid of ranks.

torchrun --nproc-per-node 2 launch/evaluate.py --load RUN --context-parallel-size 2""",
    options=EvaluationOptions,
)
