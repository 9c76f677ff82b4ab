"""The flags of ``launch/generate.py`` and ``launch/convert.py``, beside those of a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cp_megatron.cli.parse import LaunchOptions, Program
from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(LaunchOptions):
    """What to say, and how the answer is chosen."""

    prompt: str | None = None
    """The text to go on from; by default lines are read until Ctrl-D."""
    max_new_tokens: int = 256
    """Tokens of an answer at most; it ends before at an end of document."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above it tokens are drawn, flatter when larger."""
    top_k: int = 0
    """Draw among the so many likeliest tokens; 0 is all."""
    top_p: float = 1.0
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


def check_sampling(*, temperature: float, top_k: int, top_p: float) -> None:
    """The rules of ``GenerationOptions`` on how a token is chosen.

    Raises:
        ConfigError: a number out of its range, or one that has no effect.
    """
    usable = temperature == 0 or 1e-6 <= temperature <= 1e6  # smaller ones leave finite numbers
    for flag, value, fits, rule, works in (
        ("--temperature", temperature, usable, "must be 0 or lie in 1e-6 to 1e6", "0"),
        ("--top-k", top_k, top_k >= 0, "must not be below 0", "0"),
        ("--top-p", top_p, 0 < top_p <= 1, "must lie in (0, 1]", "1.0"),
    ):
        if not fits:
            raise ConfigError(flag, value, rule, works)
    if temperature == 0 and (top_k, top_p) != (0, 1.0):
        flag, value = ("--top-k", top_k) if top_k else ("--top-p", top_p)
        rule = "has no effect at temperature 0, which takes the likeliest token"
        raise ConfigError(flag, value, rule, "--temperature 1.0")
