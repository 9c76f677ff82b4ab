"""Saves a model with its AdamW state, and loads it on any grid.

The tensors of a checkpoint are ``model.<name>`` for parameters and persistent buffers, and
``optimizer.<name>.<moment>`` (``exp_avg``, ``exp_avg_sq``) for what the optimizer keeps per
parameter; its update counts are in the manifest. A tensor tied to another is stored once, under
its first name. Learning rates are not stored: the schedule is a function of the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.optim import Optimizer

import cp_megatron
from cp_megatron.checkpoint.manifest import (
    FLAG,
    FORMAT_VERSION,
    FileEntry,
    Manifest,
    TensorEntry,
    read_manifest,
    step_folder,
    verify_files,
)
from cp_megatron.checkpoint.storage import (
    DTYPE_NAMES,
    DTYPES,
    ShardReader,
    ShardWriter,
    discard,
)
from cp_megatron.config import Config
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid

Group = dist.ProcessGroup | None
Result = TypeVar("Result")
SHOWN = 3
"""Tensors that an error names."""


def save_checkpoint(
    folder: Path | str,
    *,
    step: int,
    consumed: int,
    model: nn.Module,
    optimizer: Optimizer | None,
    config: Config,
    grid: Grid,
    data_fingerprint: str,
    vocab_size: int,
    extra: Mapping[str, Any] | None = None,
    process_group: Group = None,
) -> Path:
    """Writes ``folder/step-N``; on return it is complete and on the disk. Called on every rank.

    Args:
        folder: the run's folder, made when missing; all ranks see the same files.
        step: training steps done.
        consumed: rows of the run used so far.
        model: any module; DTensor parameters (FSDP2, tensor parallel) are stored in parts.
        optimizer: AdamW over parameters of ``model``, or None to store the model alone.
        config, grid, data_fingerprint, vocab_size: go into the manifest.
        extra: plain data that goes there too; the first rank's is kept.
        process_group: the ranks that save, by default all; its first rank coordinates. Without
            torch.distributed the process saves alone.

    Returns:
        the checkpoint's folder.

    Raises:
        ConfigError: it exists already, or can not be written; on every rank alike.
        RuntimeError: a rank failed otherwise; on every rank alike, with its traceback.
    """
    target = step_folder(Path(folder), step)
    parameters, state = _model_state(model)
    state |= _optimizer_state(parameters, optimizer)
    steps = _optimizer_steps(parameters, optimizer)

    def describe(files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]) -> Manifest:
        return Manifest(
            version=FORMAT_VERSION,
            step=step,
            consumed=consumed,
            config=asdict(config),
            data_fingerprint=data_fingerprint,
            vocab_size=vocab_size,
            torch_version=torch.__version__,
            package_version=cp_megatron.__version__,
            grid=asdict(grid),
            optimizer_steps=steps,
            extra=extra or {},
            files=files,
            tensors=tensors,
        )

    writer = ShardWriter(target, rank=_rank(process_group), describe=describe)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with user_errors("--save", target), one_process_is_fine():
            state_dict_saver.save(
                state, storage_writer=writer, planner=planner, process_group=process_group
            )
    except BaseException:
        if _rank(process_group) == 0:
            # Half a checkpoint on a full disk would also fill it for the next one.
            with suppress(OSError):
                discard(writer.temporary)
        raise
    return target


def load_checkpoint(
    folder: Path | str,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
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
        process_group: the ranks that load, by default all.

    Returns:
        the manifest: step, consumed rows, fingerprint of the data.

    Raises:
        ConfigError: missing, damaged, or of another model; on every rank alike.
        RuntimeError: a rank failed otherwise; on every rank alike, with its traceback.
    """
    folder = Path(folder)
    parameters, state = _model_state(model)

    def prepare() -> Manifest:
        manifest = read_manifest(folder)
        _check_same(folder, manifest, state, parameters, optimizer)
        mine = sorted(manifest.files)[_rank(process_group) :: _size(process_group)]
        verify_files(folder, manifest, mine)
        return manifest

    manifest = agreed(prepare, process_group)
    if optimizer is not None:
        _create_optimizer_state(optimizer, parameters, manifest)
        state |= _optimizer_state(parameters, optimizer)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with user_errors(FLAG, folder), one_process_is_fine():
        state_dict_loader.load(
            state,
            storage_reader=ShardReader(folder, manifest),
            planner=planner,
            process_group=process_group,
        )
    return manifest


def _model_state(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The parameters by name, and the state they and the buffers are stored as.

    ``state_dict`` and not ``named_parameters``: it makes FSDP put its shards back into the module
    (they are gathered after a forward pass without backward), and leaves out passing buffers.
    """
    parameters: dict[str, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is not a tensor; a checkpoint holds no pickles")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(tensor, nn.Parameter):
            parameters[name] = tensor
        state[f"model.{name}"] = tensor.detach()
    return parameters, state


def _optimizer_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None
) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{moment}": value
        for name, values in _states(parameters, optimizer)
        for moment, value in values.items()
        if moment != "step" and isinstance(value, Tensor)
    }


def _optimizer_steps(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None
) -> dict[str, int]:
    return {
        name: int(values["step"])
        for name, values in _states(parameters, optimizer)
        if "step" in values
    }


def _states(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in parameters.items():
        # ``state`` is a defaultdict: asking for a parameter it lacks would add it.
        if optimizer is not None and parameter in optimizer.state:
            yield name, optimizer.state[parameter]


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


def agreed(action: Callable[[], Result], group: Group) -> Result:
    """Runs it on every rank; when one fails, all raise the failure of the first that did."""
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if not dist.is_initialized():
        failures = [failure]
    else:
        failures = [None] * _size(group)
        dist.all_gather_object(failures, failure, group=group)
    for first in failures:
        if first is not None:
            raise first
    assert result is not None
    return result


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


def _rank(group: Group) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _size(group: Group) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1
