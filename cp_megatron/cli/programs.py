"""The flags of ``evaluate.py``, ``generate.py`` and ``convert.py``, beside those of a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from cp_megatron.cli.parse import LaunchOptions, Program
from cp_megatron.config.schema.ranges import LARGEST_SIZE, Count, Range, Size
from cp_megatron.errors import ConfigError

Part = Literal["train", "valid", "test", "all"]
TaskName = Literal["perplexity", "needle", "variables"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(LaunchOptions):
    """The measurements."""

    tasks: tuple[TaskName, ...] = TASKS
    """perplexity (by position), needle (a number to find again), variables (a chain to follow)."""
    lengths: tuple[Annotated[int, Range(2, LARGEST_SIZE)], ...] = (512, 2048, 8192)
    """Tokens per row; each length is one column of the results."""
    num_samples: Size = 8
    """Rows per length, and for needle per length and depth."""
    buckets: Annotated[int, Range(1, 32)] = 8
    """Buckets of positions for the perplexity; each is twice as long as the one before."""
    depths: tuple[Annotated[int, Range(0, 100)], ...] = (0, 25, 50, 75, 100)
    """Places of the needle in the text, in percent."""
    part: Part | None = None
    """Part of the data, as --split cuts it; by default all of --data-path if it is given, otherwise
    the data that the run validated on."""
    output: str | None = None
    """A new folder for results.json and the pictures; by default a new evaluation-<n>."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(LaunchOptions):
    """The text to continue, and how tokens are chosen."""

    prompt: str | None = None
    """The text to continue; by default lines are read until Ctrl-D."""
    max_new_tokens: Size = 256
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
    """A GGUF file of the architecture llama, qwen2, qwen3, gemma2 or gemma3."""
    from_torch: str | None = None
    """A folder of torch.distributed.checkpoint (torchtitan, FSDP, accelerate), or a file of
    torch.save; --load-hf names a folder with the model's config.json, and its tokenizer if any."""
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
    description="""Turn a checkpoint of this or another program into a Hugging Face folder.

python launch/convert.py --from-gguf model.gguf --output model
python launch/convert.py --from-torch outputs/checkpoint/step-1000 --load-hf config --output model
python launch/convert.py --load RUN --output model --dtype bfloat16""",
    options=ConversionOptions,
)


def refuse_unread(given: Collection[str], read: Collection[str], program: Program) -> None:
    """Refuses flags of a training run that the user typed, but that a program does not read.

    Raises:
        ConfigError: a flag is given that is not read.
    """
    for flag in sorted(set(given) - set(read)):
        works = "leave it out"
        if "pipeline" in flag:
            works += ": any checkpoint loads without pipeline stages"
        raise ConfigError(flag, "", f"has no effect on {program.name}", works)


def check_sampling(options: GenerationOptions) -> None:
    """Checks what the ranges of the single options do not say.

    Raises:
        ConfigError: the temperature is too small, or an option has no effect.
    """
    if 0 < options.temperature < 1e-6:  # Logits divided by less may overflow.
        rule = "must be 0 or at least 1e-6"
        raise ConfigError("--temperature", options.temperature, rule, "0")
    if options.temperature == 0 and (options.top_k, options.top_p) != (0, 1.0):
        flag, value = ("--top-k", options.top_k) if options.top_k else ("--top-p", options.top_p)
        rule = "has no effect at temperature 0, which takes the most likely token"
        raise ConfigError(flag, value, rule, "--temperature 1.0")
