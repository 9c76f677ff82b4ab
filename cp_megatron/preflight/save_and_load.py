"""Checks where a run is saved and what it continues from; nothing is ever overwritten."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

from cp_megatron.checkpoint.find_checkpoint import (
    CheckpointChoice,
    named_step,
    newest_intact,
    saved_config,
)
from cp_megatron.checkpoint.manifest import Manifest, read_manifest
from cp_megatron.checkpoint.step_folders import TEMPORARY, newest_step
from cp_megatron.cli.megatron_flags import WEIGHTS_ONLY
from cp_megatron.config import Config
from cp_megatron.config.fields import settings
from cp_megatron.config.files.run_folders import CONFIG_FILE, is_vacant, run_folder
from cp_megatron.errors import ConfigError
from cp_megatron.families.mixture import BALANCE_FIELDS
from cp_megatron.families.registry import spelled
from cp_megatron.families.rope_fields import ROPE_FIELDS, fields_of

_MAY_CHANGE = BALANCE_FIELDS | frozenset(
    {"hidden_dropout", "attention_dropout", "init_method_std", "window_size", "window_layers"}
    | {"vocab_size"}  # the number of tokens is compared instead
)
"""Settings of the model that a run may change when it continues."""


def model_name(config: Config) -> str:
    """The name for a run's folder: its preset, or the name of its Hugging Face folder."""
    folder = config.checkpoint.load_hf
    return config.preset if folder is None else Path(folder).resolve().name or config.preset


def fresh_run_folder(root: Path, name: str) -> Path:
    """The first of ``root/<name>-1``, ``-2``, ... that does not exist. It is not created.

    Call it on one rank only: as soon as that rank creates the folder, the answer changes.
    """
    folders = (root / f"{name}-{number}" for number in count(1))
    return next(folder for folder in folders if not os.path.lexists(folder))


def find_load(config: Config) -> CheckpointChoice | None:
    """The checkpoint to continue from, with its manifest; None for a new run.

    In a run's folder, it is the newest intact checkpoint. A named ``step-N`` is taken as it is.

    Raises:
        ConfigError: there is no checkpoint, or it is damaged.
    """
    if config.checkpoint.load is None:
        return None
    path = Path(config.checkpoint.load)
    if run_folder(path) == path and (newest := newest_intact(path)) is not None:
        return newest
    step = named_step(path)
    return CheckpointChoice(folder=step, manifest=read_manifest(step))


def check_resume(config: Config, manifest: Manifest, vocab_size: int) -> None:
    """Checks that the checkpoint is of this model.

    Args:
        config: the run, with ``--load``.
        manifest: the manifest of the checkpoint.
        vocab_size: the vocabulary size of the run.

    Raises:
        ConfigError: the model differs.
    """
    load = str(config.checkpoint.load)
    if manifest.vocab_size != vocab_size:
        rule = f"its vocabulary has {manifest.vocab_size} tokens, this run's has {vocab_size}"
        raise ConfigError("--load", load, rule, "the tokenizer it was trained with")
    now, then = _shape(config), _shape(saved_config(manifest, load))
    for name, value in now.items():
        if then[name] != value:
            rule, works = f"the checkpoint {load} is of another model", then[name]
            if name == "max_position_embeddings" and config.model.max_position_embeddings is None:
                name = "seq_length"  # from which the number of positions is derived
            raise ConfigError(spelled(name, value), "", rule, spelled(name, works))


def check_optimizer(config: Config, manifest: Manifest) -> None:
    """Checks that the checkpoint holds the state of this run's optimizer.

    Raises:
        ConfigError: it holds that of another one.
    """
    section = manifest.config.get("optimizer")
    saved = section.get("optimizer", "adam") if isinstance(section, dict) else "adam"
    name, load = config.optimizer.optimizer, config.checkpoint.load
    if saved != name:
        rule = f"cannot continue from the state that {saved} has left in {load}"
        works = f"--optimizer {saved}, or {WEIGHTS_ONLY}"
        raise ConfigError("--optimizer", name, rule, works)


def data_changes(config: Config, manifest: Manifest) -> tuple[str, ...]:
    """Notes if the run continues with its data cut, ordered or counted in another way."""
    before: dict[str, Any] = {}
    for name in ("data", "train"):
        section = manifest.config.get(name)
        before |= section if isinstance(section, dict) else {}
    now = {"seed": config.train.seed}
    now |= {name: getattr(config.data, name) for name in ("seq_length", "split", "packing")}
    changed = [
        f"{settings()[name].flag} is {value}, was {before[name]}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]
    rule = f"the run continues at row {manifest.consumed:,} of new rows"
    notes = [f"{', '.join(changed)}: {rule}"] if changed else []
    size, old = config.data.global_batch_size, before.get("global_batch_size")
    if size is not None and old is not None and size != old:
        rule = f"step {manifest.step + 1} begins at row {manifest.consumed:,} of the data"
        notes.append(f"--global-batch-size is {size}, was {old}: {rule}")
    return tuple(notes)


def check_save(config: Config, loaded: CheckpointChoice | None, *, auto: bool = False) -> None:
    """Checks that the folder to save in is new, empty, or the one of the run that continues.

    Args:
        config: the run.
        loaded: the checkpoint that it continues from.
        auto: the folder may be that of a run that has no checkpoint yet.

    Raises:
        ConfigError: the folder contains files that would be overwritten or mixed up with the run's.
    """
    save = config.checkpoint.save
    if save is None:
        return
    folder = Path(save)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError("--save", save, "is a file, not a folder", "a new folder")
    check_writable("--save", folder)
    if loaded is not None and folder.resolve() == loaded.folder.parent.resolve():
        newest = newest_step(folder)
        known = {path.resolve() for path in (loaded.folder, *loaded.passed_over)}
        if newest is not None and newest.resolve() not in known:
            step = newest.name
            rule = f"its folder also has {step}, with which a run from here would be mixed up"
            works = f"--load {folder}, or --save with a new folder"
            raise ConfigError("--load", config.checkpoint.load, rule, works)
    elif folder.is_dir() and not is_vacant(folder) and not (auto and _is_begun(folder)):
        rule = "is not empty, and nothing is ever overwritten"
        a_run = newest_step(folder) is not None
        works = f"--load {save} to continue it, or a new folder" if a_run else ""
        raise ConfigError("--save", save, rule, works or "a new folder")


def check_writable(flag: str, folder: Path) -> None:
    """Checks that a folder can be written, or can be made; creates nothing.

    Raises:
        ConfigError: it cannot.
    """
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(flag, folder, f"{existing} is a file, not a folder", "a new folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(flag, folder, f"{existing} is not writable", "another folder")
    longest = os.pathconf(existing, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in folder.parts):
        rule = f"a name in it is longer than {longest} bytes"
        raise ConfigError(flag, folder, rule, "a shorter name")
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(flag, folder, f"cannot be used: {error.strerror}") from None


def _shape(config: Config) -> dict[str, Any]:
    """The settings in which a run must agree with its checkpoint, with defaults filled in."""
    model, kind = config.model, config.model.position_embedding_type
    shape = {name: value for name, value in vars(model).items() if name not in _MAY_CHANGE}
    shape |= {"ffn_hidden_size": model.ffn_size, "num_query_groups": model.num_kv_heads}
    shape |= {"kv_channels": model.head_dim, "add_qkv_bias": model.has_qkv_bias}
    if kind != "rope":
        shape |= dict.fromkeys(("rotary_base", "rope_type", *ROPE_FIELDS))
    elif "original_max_position_embeddings" in fields_of(model.rope_type):
        shape["original_max_position_embeddings"] = model.original_length
    positions = model.max_position_embeddings or config.data.seq_length
    return shape | {"max_position_embeddings": positions if kind == "learned_absolute" else None}


def _is_begun(folder: Path) -> bool:
    """Whether it is the folder of a run that ended before its first checkpoint."""
    is_temporary = (step.name.endswith(TEMPORARY) for step in folder.glob("step-*"))
    return (folder / CONFIG_FILE).is_file() and all(is_temporary)
