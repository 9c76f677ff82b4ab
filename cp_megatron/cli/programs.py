"""The flags of ``evaluate.py``, ``generate.py`` and ``convert.py``, beside those of a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal

from cp_megatron.cli.parse import LaunchOptions, Program
from cp_megatron.config.fields import settings_of
from cp_megatron.config.schema.ranges import Count, Range
from cp_megatron.errors import ConfigError

Part = Literal["train", "valid", "test", "all"]

TASKS = ("perplexity", "needle", "variables")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(LaunchOptions):
    """What is measured."""

    tasks: tuple[str, ...] = TASKS
    """perplexity (by position), needle (a number to find again), variables (a chain to follow)."""
    lengths: tuple[int, ...] = (512, 2048, 8192)
    """Tokens per row; each length is one column of the results."""
    num_samples: int = 8
    """Rows per length, and for needle per length and depth."""
    buckets: int = 8
    """Buckets of positions for the perplexity; each is twice as long as the one before."""
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    """Places of the needle in the text, in percent."""
    part: Part | None = None
    """Part of the data, as --split cuts it; by default all of --data-path if it is given, otherwise
    the data that the run validated on."""
    output: str = "evaluation"
    """A new folder for results.json and the pictures."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(LaunchOptions):
    """The text to continue, and how tokens are chosen."""

    prompt: str | None = None
    """The text to continue; by default lines are read until Ctrl-D."""
    max_new_tokens: int = 256
    """Largest number of tokens of an answer, which ends earlier at an end of document."""
    temperature: Annotated[float, Range(0, 1e6)] = 0.0
    """0 takes the likeliest token; above 0 tokens are drawn, more evenly at higher values."""
    top_k: Count = 0
    """Draw among this many of the likeliest tokens; 0 means all."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Draw among the likeliest tokens whose probabilities reach this sum."""
    chat: bool = False
    """Hold a conversation, formatted by the tokenizer's chat template."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(LaunchOptions):
    """The file to read and the folder to write."""

    from_gguf: str | None = None
    """A GGUF file of the architecture llama, qwen2 or qwen3."""
    output: str | None = None
    """The Hugging Face folder to write; it must not exist."""


EVALUATE = Program(
    name="evaluate.py",
    description="""Evaluate a trained transformer on long rows over any grid of ranks.

torchrun --nproc-per-node 2 launch/evaluate.py --load RUN --context-parallel-size 2""",
    options=EvaluationOptions,
)
GENERATE = Program(
    name="generate.py",
    description="""Let a trained transformer continue a text, on one rank.

python launch/generate.py --load RUN --prompt "Once upon a time"
python launch/generate.py --load-hf DIR --chat""",
    options=GenerationOptions,
)
CONVERT = Program(
    name="convert.py",
    description="""Turn a GGUF file or a checkpoint into a Hugging Face folder.

python launch/convert.py --from-gguf model.gguf --output model
python launch/convert.py --load RUN --output model --dtype bfloat16""",
    options=ConversionOptions,
)


def refuse_unread(given: Collection[str], read: Collection[str], program: Program) -> None:
    """Refuses flags of a training run that a program does not read.

    Args:
        given: the flags that the user typed.
        read: the flags that the program reads.
        program: the program, for the message.

    Raises:
        ConfigError: a flag is given that is not read.
    """
    for flag in sorted(given):
        if flag not in read:
            raise ConfigError(flag, "", f"has no effect on {program.name}", "leave it out")


def check_sampling(*, temperature: float, top_k: int, top_p: float) -> None:
    """Checks the numbers by which a token is chosen.

    Raises:
        ConfigError: a number is out of its range or has no effect.
    """
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    for row in settings_of(GenerationOptions):
        row.check(getattr(options, row.name))
    if 0 < temperature < 1e-6:  # Logits divided by less may be infinite.
        raise ConfigError("--temperature", temperature, "must be 0 or at least 1e-6", "0")
    if temperature == 0 and (top_k, top_p) != (0, 1.0):
        flag, value = ("--top-k", top_k) if top_k else ("--top-p", top_p)
        rule = "has no effect at temperature 0, which takes the likeliest token"
        raise ConfigError(flag, value, rule, "--temperature 1.0")
