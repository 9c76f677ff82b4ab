"""What ``launch/generate.py`` will do, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cp_megatron.checkpoint.manifest import Manifest, read_manifest
from cp_megatron.checkpoint.newest import named_step
from cp_megatron.cli.programs import (
    GENERATE,
    GenerationOptions,
    check_sampling,
    refuse_unread,
)
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.fields import check_values, settings
from cp_megatron.config.schema.ranges import LARGEST_SIZE
from cp_megatron.data.tokenize.chat_template import Render, find_template
from cp_megatron.data.tokenize.tokenizer import Tokenizer, open_tokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.families.llama import read_hf_config
from cp_megatron.preflight.rope_rules import check_rope

_READ = (
    *("--load", "--load-hf", "--tokenizer-type", "--tokenizer-model", "--chat"),
    *("--prompt", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed"),
    *("--dtype", "--bf16", "--device"),
)
_ROTARY = ("rope_", "rotary_", "original_max_", "beta_", "mscale")
"""How settings of rotary positions begin; they hold no weight, so others may be tried out."""


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """A generation that passed every check.

    Attributes:
        config: the run that is loaded, or the folder's model, with the user's flags.
        options: what is asked.
        folder: the checkpoint, step-N, or the Hugging Face folder.
        manifest: of the checkpoint; None for a folder of Hugging Face.
        vocab_size: tokens the model knows.
        tokenizer: of the model.
        template: how a conversation is written; None without ``--chat``.
        ends: tokens that end an answer, beside the tokenizer's end of document.
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
) -> GenerationPlan:
    """The plan of the generation.

    Args:
        config: the loaded run with the user's flags.
        options: what is asked.
        launch: how this process was started.
        given: flags the user typed.

    Raises:
        ConfigError: it is not possible.
    """
    rotary = [row for row in settings().values() if row.name.startswith(_ROTARY)]
    refuse_unread(given, (*_READ, *(row.flag for row in rotary)), GENERATE)
    if launch.world_size > 1:
        rule = "a text is continued on one rank"
        raise ConfigError("--nproc-per-node", launch.world_size, rule, "python launch/generate.py")
    if not 1 <= options.max_new_tokens <= LARGEST_SIZE:
        rule = f"must lie in 1 to {LARGEST_SIZE}"
        raise ConfigError("--max-new-tokens", options.max_new_tokens, rule, "256")
    check_sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    load, load_hf = config.checkpoint.load, config.checkpoint.load_hf
    if (load is None) == (load_hf is None):
        rule = "generation needs one trained model"
        raise ConfigError("--load", load or "", rule, "--load RUN, or --load-hf DIR")
    manifest, ends = None, frozenset[int]()
    if load_hf is not None:
        folder = Path(load_hf)
        found = read_hf_config(folder)
        tried = {row.name: getattr(config.model, row.name) for row in rotary if row.flag in given}
        config = replace(config, model=replace(found.model, **tried))
        vocab_size, ends = found.vocab_size, _ends(found.raw)
        if not {"--tokenizer-type", "--tokenizer-model"} & set(given):
            data = replace(config.data, tokenizer_type="huggingface", tokenizer_model=load_hf)
            config = replace(config, data=data)
    else:
        folder, manifest = _checkpoint(Path(str(load)))
        vocab_size = manifest.vocab_size
    check_values(config)
    check_rope(config.model, config.data.seq_length, frozenset(given))
    tokenizer = _tokenizer(config, vocab_size)
    return GenerationPlan(
        config=config,
        options=options,
        folder=folder,
        manifest=manifest,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        template=_template(tokenizer) if options.chat else None,
        ends=ends,
    )


def _ends(raw: Mapping[str, Any]) -> frozenset[int]:
    """The ``eos_token_id`` of a config.json: one, or several as Llama 3 has for turns and texts."""
    asked = raw.get("eos_token_id")
    return frozenset(x for x in (asked if isinstance(asked, list) else [asked]) if type(x) is int)


def _checkpoint(load: Path) -> tuple[Path, Manifest]:
    step = named_step(load)
    return step, read_manifest(step)


def _tokenizer(config: Config, vocab_size: int) -> Tokenizer:
    tokenizer = open_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    if tokenizer.vocab_size > vocab_size:
        rule = f"has {tokenizer.vocab_size} ids, the model {vocab_size}"
        works = "the tokenizer it was trained with"
        raise ConfigError("--tokenizer-model", tokenizer.path or tokenizer.kind, rule, works)
    return tokenizer


def _template(tokenizer: Tokenizer) -> Render:
    template = find_template(tokenizer, today=datetime.now())
    if template is None:
        rule = "the tokenizer has no chat template, and not the tokens of ChatML"
        raise ConfigError("--chat", "", rule, "leave it out, or a model that was made to talk")
    return template
