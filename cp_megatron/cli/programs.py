"""The flags of ``launch/generate.py`` and ``launch/convert.py``, beside those of a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from cp_megatron.cli.parse import LaunchOptions, Program
from cp_megatron.config.ranges import Count, Range, Size
from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(LaunchOptions):
    """What to say, and how the answer is chosen."""

    prompt: str | None = None
    """The text to go on from; by default lines are read until Ctrl-D."""
    max_new_tokens: Size = 256
    """Tokens of an answer at most; it ends before at an end of document."""
    temperature: Annotated[float, Range(0, 1e6)] = 0.0
    """0 takes the likeliest token each time; above it tokens are drawn, flatter when larger."""
    top_k: Count = 0
    """Draw among the so many likeliest tokens; 0 is all."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Draw among the likeliest tokens whose probabilities reach this sum."""
    chat: bool = False
    """Talk: the tokenizer's chat template keeps the conversation."""


GENERATE = Program(
    name="generate.py",
    description="""Let a trained transformer go on from a text, on one rank.

python launch/generate.py --load RUN --prompt "Once upon a time"
python launch/generate.py --load-hf DIR --chat""",
    options=GenerationOptions,
)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(LaunchOptions):
    """From which file to which folder."""

    from_gguf: str | None = None
    """A GGUF file of the architecture llama, qwen2 or qwen3."""
    output: str | None = None
    """The Hugging Face folder to write; it must not exist."""


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
        given: what the user typed.
        read: what the program reads.
        program: for the message.

    Raises:
        ConfigError: there is one.
    """
    for flag in sorted(given):
        if flag not in read:
            raise ConfigError(flag, "", f"has no effect on {program.name}", "leave it out")


def check_sampling(options: GenerationOptions) -> None:
    """Checks what the ranges of the single options do not say.

    Raises:
        ConfigError: the temperature is too small, or an option has no effect.
    """
    if 0 < options.temperature < 1e-6:  # the scores would overflow
        rule = "must be 0 or at least 1e-6"
        raise ConfigError("--temperature", options.temperature, rule, "0")
    if options.temperature == 0 and (options.top_k, options.top_p) != (0, 1.0):
        flag, value = ("--top-k", options.top_k) if options.top_k else ("--top-p", options.top_p)
        rule = "has no effect at temperature 0, which takes the most likely token"
        raise ConfigError(flag, value, rule, "--temperature 1.0")
