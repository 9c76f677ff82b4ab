"""Loads a checkpoint of any grid into a model and its optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cp_megatron.checkpoint.manifest import FLAG, Manifest, TensorEntry, read_manifest, verify_files
from cp_megatron.checkpoint.object_collectives import (
    Group,
    all_gather_objects,
    on_all_ranks,
    rank_in,
    size_of,
)
from cp_megatron.checkpoint.shard_reader import ShardReader, read_shards
from cp_megatron.checkpoint.shard_writer import DTYPE_NAMES, DTYPES
from cp_megatron.checkpoint.state_dict import (
    is_optimizers,
    model_state,
    optimizer_state,
    split_optimizer_name,
)
from cp_megatron.errors import ConfigError

_SHOWN = 3  # tensors that an error names


def load_checkpoint(
    folder: Path | str,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
    verified: bool = False,
    process_group: Group = None,
) -> Manifest:
    """Fills a model and its optimizer in place, and returns the manifest. Every rank calls this.

    The ranks first share the work of comparing the SHA-256 of every shard. Then each rank reads
    only the parts that it holds.

    Args:
        folder: a ``step-N``; it may have been saved on another grid.
        model: the model that was saved, with memory (not meta); its values are replaced. Each rank
            may have a pipeline stage of it.
        optimizer: AdamW or Muon over parameters of ``model``. Its state is replaced; its learning
            rates are not. None loads only the model.
        verified: whether the caller has just compared the hashes of the shards.
        process_group: the ranks that load, by default all. Together they have the whole model.

    Raises:
        ConfigError: the checkpoint is missing, damaged or of another model; on every rank.
        RuntimeError: a rank failed for another reason; on every rank, with its traceback.
    """
    folder = Path(folder)
    parameters, state = model_state(model)

    manifest = on_all_ranks(lambda: read_manifest(folder), process_group)
    expected = _expected(manifest, state, parameters, optimizer)
    unknown = _unknown(manifest, expected, process_group)

    def check() -> None:
        _check_same(folder, manifest, expected, unknown, loads_optimizer=optimizer is not None)
        if not verified:
            mine = sorted(manifest.files)[rank_in(process_group) :: size_of(process_group)]
            verify_files(folder, manifest, mine)

    on_all_ranks(check, process_group)
    if optimizer is not None:
        _create_optimizer_state(optimizer, parameters, manifest)
        state |= optimizer_state(parameters, optimizer)
    read_shards(state, ShardReader(folder, manifest.tensors), flag=FLAG, group=process_group)
    return manifest


def _create_optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], manifest: Manifest
) -> None:
    """Allocates the optimizer state that the checkpoint stores: zeros to fill, and the steps.

    A parameter without state in the checkpoint gets none; the optimizer makes it at its first
    update.
    """
    optimizer.state.clear()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if name in manifest.optimizer_steps and id(parameter) in groups:
            step = _step_tensor(manifest.optimizer_steps[name], parameter, groups[id(parameter)])
            optimizer.state[parameter]["step"] = step
    for entry_name, entry in manifest.tensors.items():
        name, moment = split_optimizer_name(entry_name)
        if is_optimizers(entry_name) and name in parameters:  # others are of other stages
            value = torch.zeros_like(parameters[name], dtype=DTYPES[entry.dtype])
            optimizer.state[parameters[name]][moment] = value.detach()


def _step_tensor(step: int, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Returns the update count in AdamW's form (torch.optim.adamw, ``_init_group``)."""
    fused = bool(group.get("fused"))
    wide = torch.get_default_dtype() == torch.float64 and not fused
    device = parameter.device if fused or group.get("capturable") else "cpu"
    return torch.tensor(float(step), dtype=torch.float64 if wide else torch.float32, device=device)


def _expected(
    manifest: Manifest,
    state: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer | None,
) -> dict[str, Tensor]:
    """Tensors of the shapes that this rank reads parts of, by name."""
    expected = dict(state)
    if optimizer is not None:
        managed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for entry_name in manifest.tensors:
            name, _ = split_optimizer_name(entry_name)
            if is_optimizers(entry_name) and id(parameters.get(name)) in managed:
                expected[entry_name] = parameters[name]
    return expected


def _unknown(manifest: Manifest, expected: Collection[str], group: Group) -> list[str]:
    """The tensors of a checkpoint that no rank reads, in order; the same on every rank."""
    names = sorted(manifest.tensors)
    bits = "".join("01"[name in expected] for name in names)  # far shorter than the names
    read = reduce(or_, (int(found or "0", 2) for found in all_gather_objects(bits, group)))
    return [name for name, bit in zip(names, f"{read:0{len(names)}b}") if bit == "0"]


def _check_same(
    folder: Path,
    manifest: Manifest,
    expected: Mapping[str, Tensor],
    unknown: Collection[str],
    *,
    loads_optimizer: bool,
) -> None:
    """Refuses a checkpoint whose tensors differ from the model's, and names the first few."""
    differences = [
        line
        for name in sorted(expected.keys() | unknown)
        if (loads_optimizer or not is_optimizers(name))
        and (line := _difference(name, manifest.tensors.get(name), expected.get(name)))
    ]
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        rule = f"is of another model: {'; '.join(differences[:_SHOWN])}{more}"
        raise ConfigError(FLAG, folder, rule, "the flags that it was saved with")
    if loads_optimizer and manifest.step > 0 and not manifest.optimizer_steps:
        raise ConfigError(FLAG, folder, "holds no optimizer state to continue from")


def _difference(name: str, saved: TensorEntry | None, here: Tensor | None) -> str:
    if saved is None:
        return f"{name} is not in the checkpoint"
    if here is None:
        return f"{name} is not in this model"
    if saved.shape != tuple(here.shape):
        return f"{name} is {list(saved.shape)}, but {list(here.shape)} in this model"
    if name.startswith("model.") and DTYPES[saved.dtype] != here.dtype:
        dtype = DTYPE_NAMES.get(here.dtype, here.dtype)
        return f"{name} is {saved.dtype}, but {dtype} in this model"
    return ""
