"""Saves a model with its AdamW state, and loads it on any grid.

The tensors of a checkpoint are ``model.<name>`` for parameters and persistent buffers, and
``optimizer.<name>.<moment>`` (``exp_avg``, ``exp_avg_sq``) for what the optimizer keeps per
parameter; its update counts are in the manifest. A tensor tied to another is stored once, under
its first name. Learning rates are not stored: the schedule is a function of the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.optim import Optimizer

from cp_megatron.checkpoint.agreement import Group, agreed, rank_in, size_of
from cp_megatron.checkpoint.manifest import (
    FLAG,
    Manifest,
    TensorEntry,
    read_manifest,
    verify_files,
)
from cp_megatron.checkpoint.save import start_save
from cp_megatron.checkpoint.shard import DTYPE_NAMES, DTYPES
from cp_megatron.checkpoint.state import model_state, optimizer_state
from cp_megatron.checkpoint.storage import ShardReader
from cp_megatron.errors import ConfigError

SHOWN = 3
"""Tensors that an error names."""


def save_checkpoint(folder: Path | str, **facts: Any) -> Path:
    """``start_save`` and its end: on return the checkpoint is complete and on the disk.

    Returns:
        the checkpoint's folder.

    Raises:
        ConfigError: it exists already, or can not be written; on every rank alike.
        RuntimeError: a rank failed otherwise; on every rank alike, with its traceback.
    """
    return start_save(folder, background=False, **facts).wait()


def load_checkpoint(
    folder: Path | str,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
    verified: bool = False,
    process_group: Group = None,
) -> Manifest:
    """Fills model and optimizer in place from a ``step-N``. Called on every rank.

    Every shard's SHA-256 is compared first (each rank takes its share of the shards), then each
    rank reads only what it holds.

    Args:
        folder: the checkpoint; saved on any grid.
        model: as it was saved, on memory (not meta); its values are replaced.
        optimizer: AdamW over parameters of ``model``; its state is replaced, its learning rates
            are not. None loads the model alone.
        verified: the shards' hashes have been compared just now.
        process_group: the ranks that load, by default all.

    Returns:
        the manifest: step, consumed rows, fingerprint of the data.

    Raises:
        ConfigError: missing, damaged, or of another model; on every rank alike.
        RuntimeError: a rank failed otherwise; on every rank alike, with its traceback.
    """
    folder = Path(folder)
    parameters, state = model_state(model)

    def prepare() -> Manifest:
        manifest = read_manifest(folder)
        _check_same(folder, manifest, state, parameters, optimizer)
        if not verified:
            mine = sorted(manifest.files)[rank_in(process_group) :: size_of(process_group)]
            verify_files(folder, manifest, mine)
        return manifest

    manifest = agreed(prepare, process_group)
    if optimizer is not None:
        _create_optimizer_state(optimizer, parameters, manifest)
        state |= optimizer_state(parameters, optimizer)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with user_errors(FLAG, folder), one_process_is_fine():
        state_dict_loader.load(
            state,
            storage_reader=ShardReader(folder, manifest),
            planner=planner,
            process_group=process_group,
        )
    return manifest


def _create_optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], manifest: Manifest
) -> None:
    """Gives every parameter the state the checkpoint has of it: zeros to be filled, and the step.

    Parameters that had no state yet keep none, and the optimizer makes it at their first update.
    """
    optimizer.state.clear()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if name in manifest.optimizer_steps and id(parameter) in groups:
            step = _step_tensor(manifest.optimizer_steps[name], parameter, groups[id(parameter)])
            optimizer.state[parameter]["step"] = step
    for entry_name, entry in manifest.tensors.items():
        if entry_name.startswith("optimizer."):
            name, moment = _optimizer_name(entry_name)
            value = torch.zeros_like(
                parameters[name], dtype=DTYPES[entry.dtype], memory_format=torch.preserve_format
            )
            optimizer.state[parameters[name]][moment] = value.detach()


def _step_tensor(step: int, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The count of updates in the form AdamW keeps it (torch.optim.adamw, ``_init_group``)."""
    fused = bool(group.get("fused"))
    wide = torch.get_default_dtype() == torch.float64 and not fused
    return torch.tensor(
        float(step),
        dtype=torch.float64 if wide else torch.float32,
        device=parameter.device if fused or group.get("capturable") else "cpu",
    )


def _optimizer_name(entry_name: str) -> tuple[str, str]:
    """``optimizer.layers.0.weight.exp_avg`` -> (``layers.0.weight``, ``exp_avg``)."""
    name, _, moment = entry_name.removeprefix("optimizer.").rpartition(".")
    return name, moment


def _check_same(
    folder: Path,
    manifest: Manifest,
    state: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer | None,
) -> None:
    """Refuses a checkpoint whose tensors are not the model's, naming the first few."""
    expected = dict(state)
    if optimizer is not None:
        managed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for entry_name in manifest.tensors:
            name, _ = _optimizer_name(entry_name)
            if entry_name.startswith("optimizer.") and id(parameters.get(name)) in managed:
                expected[entry_name] = parameters[name]
    differences = [
        line
        for name in sorted(expected.keys() | manifest.tensors.keys())
        if (optimizer is not None or not name.startswith("optimizer."))
        and (line := _difference(name, manifest.tensors.get(name), expected.get(name)))
    ]
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        rule = f"is of another model: {'; '.join(differences[:SHOWN])}{more}"
        raise ConfigError(FLAG, folder, rule, "the flags it was saved with")
    if optimizer is not None and manifest.step > 0 and not manifest.optimizer_steps:
        raise ConfigError(FLAG, folder, "holds no optimizer state to go on from")


def _difference(name: str, saved: TensorEntry | None, here: Tensor | None) -> str:
    if saved is None:
        return f"{name} is not in it"
    if here is None:
        return f"{name} is not in this model"
    if saved.shape != tuple(here.shape):
        return f"{name} is {list(saved.shape)}, here {list(here.shape)}"
    if name.startswith("model.") and DTYPES[saved.dtype] != here.dtype:
        return f"{name} is {saved.dtype}, here {DTYPE_NAMES.get(here.dtype, here.dtype)}"
    return ""


@contextmanager
def user_errors(flag: str, folder: Path) -> Iterator[None]:
    """Turns torch's CheckpointException, no ``Exception``, into one that callers expect."""
    try:
        yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items(), key=lambda failure: failure[0])
        # A rank's Ctrl-C is no failure of the checkpoint.
        if isinstance(error, ConfigError) or not isinstance(error, Exception):
            raise error from None
        if isinstance(error, OSError):
            rule = f"rank {rank}: {error.strerror or error}"
            raise ConfigError(flag, folder, rule, "a disk with room and write access") from None
        raise RuntimeError(f"checkpoint {folder} failed\n{failed}") from None


@contextmanager
def one_process_is_fine() -> Iterator[None]:
    """torch.distributed.checkpoint without its warning that there is no group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield
