"""Where a run is saved and what it goes on from; nothing is ever overwritten. No torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cp_megatron.checkpoint.find_checkpoint import Newest, named_step, newest_whole
from cp_megatron.checkpoint.manifest import Manifest, read_manifest
from cp_megatron.checkpoint.step_folders import TEMPORARY, newest_step
from cp_megatron.config import Config
from cp_megatron.config.fields import settings
from cp_megatron.config.files.run_folders import CONFIG_FILE, run_folder
from cp_megatron.config.files.yaml_io import overlay
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.rope_rules import FIELDS


def model_name(config: Config) -> str:
    """Where the model came from, in a word: the preset, or the Hugging Face folder's name."""
    folder = config.checkpoint.load_hf
    return config.preset if folder is None else Path(folder).resolve().name or config.preset


def fresh_run_folder(root: Path, name: str) -> Path:
    """The first of ``root/<name>-1``, ``-2``, ... that does not exist. Nothing is made.

    Call it on one rank and tell the others: the folder exists as soon as that rank makes it.
    """
    number = 1
    while os.path.lexists(root / f"{name}-{number}"):
        number += 1
    return root / f"{name}-{number}"


class FinishedError(ConfigError):
    """The run that ``--load auto`` goes on with has nothing left to train."""


def find_load(config: Config) -> Newest | None:
    """The checkpoint that training goes on from, its manifest read; None to start anew.

    Of a run's folder the newest that is whole; a ``step-N`` that is named is it, or none.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if config.checkpoint.load is None:
        return None
    path = Path(config.checkpoint.load)
    found = newest_whole(path) if run_folder(path) == path else None
    if found is None:
        step = named_step(path)
        found = Newest(folder=step, manifest=read_manifest(step))
    return found


def check_goes_on(
    config: Config, manifest: Manifest, vocab_size: int, *, auto: bool = False
) -> None:
    """The checkpoint is of this model, and there is something left to train.

    Args:
        config: the run; it loads.
        manifest: of the checkpoint.
        vocab_size: of the model.
        auto: the same words are said however often the run is started.

    Raises:
        FinishedError: ``auto``, and the run is over.
        ConfigError: one of the two does not hold.
    """
    load = str(config.checkpoint.load)
    _check_same_model(config, manifest, vocab_size, load)
    if manifest.step >= config.train.train_iters:
        kind = FinishedError if auto else ConfigError
        rule = f"the run is at step {manifest.step} already; to go on it must be more"
        works = str(manifest.step + config.train.train_iters)
        raise kind("--train-iters", config.train.train_iters, rule, works)


def data_changes(config: Config, manifest: Manifest) -> tuple[str, ...]:
    """What a person should know of a run that goes on with its data cut or ordered otherwise."""
    before: dict[str, Any] = {}
    for name in ("data", "train"):
        section = manifest.config.get(name)
        before |= section if isinstance(section, dict) else {}
    data = config.data
    now: dict[str, Any] = {"seed": config.train.seed, "seq_length": data.seq_length}
    now |= {"split": data.split, "packing": data.packing}
    changed = [
        f"{settings()[name].flag} is {value}, was {before[name]}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]
    rule = f"it goes on at row {manifest.consumed:,} of rows that are cut anew"
    return (f"{', '.join(changed)}: {rule}",) if changed else ()


def check_save(
    config: Config,
    loaded: Path | None,
    *,
    passed_over: Collection[Path] = (),
    auto: bool = False,
) -> None:
    """The folder to save in: new or empty, or the one of the run that goes on.

    Args:
        config: the run.
        loaded: the checkpoint that it goes on from.
        passed_over: newer ones there that are damaged.
        auto: the folder may be one that was begun and has no checkpoint yet.

    Raises:
        ConfigError: something lies there that would be mixed up or overwritten.
    """
    save = config.checkpoint.save
    if save is None:
        return
    folder = Path(save)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError("--save", save, "is a file, not a folder", "a new folder")
    _check_writable(folder)
    if loaded is not None and folder.resolve() == loaded.parent.resolve():
        newest = newest_step(folder)
        known = {path.resolve() for path in (loaded, *passed_over)}
        if newest is not None and newest.resolve() not in known:
            rule = f"its folder goes on to {newest.name}, which a run from here would mix with"
            works = f"--load {folder}, or --save with a new folder"
            raise ConfigError("--load", config.checkpoint.load, rule, works)
    elif folder.is_dir() and any(folder.iterdir()) and not (auto and _is_begun(folder)):
        rule = "is not empty, and nothing is overwritten"
        a_run = newest_step(folder) is not None
        works = f"--load {save} to go on with it, or a new folder" if a_run else ""
        raise ConfigError("--save", save, rule, works or "a new folder")


def _check_writable(folder: Path) -> None:
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError("--save", folder, f"{existing} is a file, not a folder", "a new folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError("--save", folder, f"{existing} can not be written to", "another folder")
    longest = os.pathconf(existing, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in folder.parts):
        rule = f"a name in it is longer than {longest} bytes"
        raise ConfigError("--save", folder, rule, "a shorter name")
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError("--save", folder, f"can not be used: {error.strerror}") from None


def _check_same_model(config: Config, manifest: Manifest, vocab_size: int, load: str) -> None:
    if manifest.vocab_size != vocab_size:
        rule = f"its vocabulary has {manifest.vocab_size} tokens, this run's {vocab_size}"
        raise ConfigError("--load", load, rule, "the tokenizer it was trained with")
    now, then = _shape(config), _shape(_saved_config(manifest, load))
    for name, value in now.items():
        if then[name] != value:
            rule = f"the checkpoint {load} is of another model"
            raise ConfigError(
                _spelled(name, value, config), "", rule, _spelled(name, then[name], config)
            )


def _spelled(name: str, value: object, config: Config) -> str:
    """The flag and value that say it."""
    if name == "max_position_embeddings" and config.model.max_position_embeddings is None:
        name = "seq_length"
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _saved_config(manifest: Manifest, load: str) -> Config:
    """The model and data of the checkpoint; what a later version added has its default."""
    values: dict[str, Any] = {}
    try:
        for section in ("model", "data"):
            entries = manifest.config[section]
            rows = [row for row in settings().values() if row.section == section]
            values |= {
                row.name: row.from_yaml(entries[row.name]) for row in rows if row.name in entries
            }
        return overlay(Config(), values)
    except (KeyError, TypeError, ValueError) as error:
        rule = f"its manifest does not say its model: {error}"
        raise ConfigError("--load", load, rule, "another step") from None


def _shape(config: Config) -> dict[str, Any]:
    """What makes two models one: dropout and initial weights do not, defaults are filled in."""
    model, seq_length = config.model, config.data.seq_length
    learned = model.position_embedding_type == "learned_absolute"
    rope = model.position_embedding_type == "rope"
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "normalization": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "swiglu": model.swiglu,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base if rope else None,
        "max_position_embeddings": (model.max_position_embeddings or seq_length)
        if learned
        else None,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "disable_bias_linear": model.disable_bias_linear,
        "add_qkv_bias": model.has_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "rope_type": model.rope_type if rope else None,
        **{name: getattr(model, name) if rope else None for name in sorted(FIELDS)},
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
    }


def _is_begun(folder: Path) -> bool:
    """A run lies there that ended before its first checkpoint."""
    return (folder / CONFIG_FILE).is_file() and not any(
        not step.name.endswith(TEMPORARY) for step in folder.glob("step-*")
    )
