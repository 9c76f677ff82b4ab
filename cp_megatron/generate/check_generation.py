"""Checks a generation before torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cp_megatron.checkpoint.find_checkpoint import named_step
from cp_megatron.checkpoint.manifest import Manifest, read_manifest
from cp_megatron.cli.programs import GENERATE, GenerationOptions, check_sampling, refuse_unread
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.fields import check_values, settings
from cp_megatron.data.tokenize.chat_template import Render, find_template
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.data.tokenize.tokenizer import Tokenizer, words_for
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import read_hf_config
from cp_megatron.preflight.rope_rules import check_rope

_READ = (
    *("--load", "--load-hf", "--tokenizer-type", "--tokenizer-model", "--chat"),
    *("--vocab-file", "--merge-file"),
    *("--prompt", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed"),
    *("--dtype", "--bf16", "--device"),
)
_ROTARY = ("rope_", "rotary_", "original_max_", "beta_", "mscale")
"""Prefixes of settings of rotary positions. They have no weights, so other values can be tried."""


@dataclass(frozen=True, kw_only=True)
class GenerationSetup:
    """A generation that passed every check.

    Attributes:
        config: the configuration of the run or of the Hugging Face model, with the user's flags.
        options: the options of the generation.
        folder: the checkpoint ``step-N`` or the Hugging Face folder.
        manifest: the checkpoint's manifest; None for a Hugging Face folder.
        vocab_size: the size of the model's vocabulary.
        tokenizer: the model's tokenizer.
        template: the chat template; None without ``--chat``.
        ends: tokens that end an answer, in addition to the tokenizer's end of document.
    """

    config: Config
    options: GenerationOptions
    folder: Path
    manifest: Manifest | None
    vocab_size: int
    tokenizer: Tokenizer
    template: Render | None
    ends: frozenset[int] = frozenset()


def check_generation(
    config: Config, options: GenerationOptions, launch: Launch, *, given: Collection[str]
) -> GenerationSetup:
    """Checks what the user asks for, and finds the model.

    Args:
        config: the configuration of the loaded run, with the user's flags.
        options: the options of the generation.
        launch: how this process was started.
        given: the flags that the user typed.

    Raises:
        ConfigError: the generation is not possible.
    """
    rotary = [row for row in settings().values() if row.name.startswith(_ROTARY)]
    refuse_unread(given, (*_READ, *(row.flag for row in rotary)), GENERATE)
    check_sampling(options)
    if launch.world_size > 1:
        rule = "text is generated on one rank"
        raise ConfigError("--nproc-per-node", launch.world_size, rule, "python launch/generate.py")
    load, load_hf = config.checkpoint.load, config.checkpoint.load_hf
    if (load is None) == (load_hf is None):
        rule = "generation needs one trained model"
        raise ConfigError("--load", load or "", rule, "--load RUN, or --load-hf DIR")
    manifest, ends = None, frozenset[int]()
    if load_hf is not None:
        folder = Path(load_hf)
        read = read_hf_config(folder)
        typed = {row.name: getattr(config.model, row.name) for row in rotary if row.flag in given}
        config = replace(config, model=replace(read.model, **typed))
        vocab_size, ends = read.vocab_size, end_tokens(read.raw)
        if not {"--tokenizer-type", "--tokenizer-model"} & set(given):
            data = replace(config.data, tokenizer_type="huggingface", tokenizer_model=load_hf)
            config = replace(config, data=data)
    else:
        folder = named_step(Path(str(load)))
        manifest = read_manifest(folder)
        vocab_size = manifest.vocab_size
    check_values(config)
    check_rope(config.model, config.data.seq_length, frozenset(given))
    tokenizer = _tokenizer(config, vocab_size)
    return GenerationSetup(
        config=config,
        options=options,
        folder=folder,
        manifest=manifest,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        template=_template(tokenizer) if options.chat else None,
        ends=ends,
    )


def end_tokens(raw: Mapping[str, Any]) -> frozenset[int]:
    """Returns the ``eos_token_id`` of a config.json, which is one token, a list or missing."""
    ids = raw.get("eos_token_id")
    return frozenset(x for x in (ids if isinstance(ids, list) else [ids]) if type(x) is int)


def _tokenizer(config: Config, vocab_size: int) -> Tokenizer:
    tokenizer = tokenizer_of(config.data)
    if tokenizer.vocab_size > vocab_size:
        rule = f"has {tokenizer.vocab_size} tokens, but the model has {vocab_size}"
        works = "the tokenizer that the model was trained with"
        raise ConfigError(*words_for(tokenizer), rule, works)
    return tokenizer


def _template(tokenizer: Tokenizer) -> Render:
    template = find_template(tokenizer, today=datetime.now())
    if template is None:
        rule = "the tokenizer has no chat template and no ChatML tokens"
        raise ConfigError("--chat", "", rule, "leave it out, or use a chat model")
    return template
