"""Saves a model with its AdamW state, behind the training.

    training   | plan, copy |  step  |  step  |  step  |
    thread                  | write, hash, fsync | manifest, rename | older ones |

torch.distributed.checkpoint plans who writes which box of which tensor. A rank's boxes are copied,
and the training goes on; a thread of every rank writes its shard, the first rank then the manifest,
and gives ``step-N.tmp`` its name. All ranks learn how it ended. What the ranks tell each other goes
over a group that nothing else uses meanwhile.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.optim import Optimizer

import cp_megatron
from cp_megatron.checkpoint.agreement import (
    Group,
    attempt,
    from_first,
    gathered,
    raise_first,
    rank_in,
)
from cp_megatron.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TEMPORARY,
    ChunkEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    finished_steps,
    step_folder,
    unfinished_steps,
)
from cp_megatron.checkpoint.shard import (
    DTYPE_NAMES,
    HostMemory,
    discard,
    sync,
    take_image,
    write_image,
    write_text,
)
from cp_megatron.checkpoint.state import model_state, optimizer_state, optimizer_steps
from cp_megatron.config import Config
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid

FLAG = "--save"
_NICENESS = 10
"""Of the writing threads: a step that wants the cores goes first."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which older checkpoints stay when another one is complete.

    Attributes:
        latest: so many of the newest; None keeps all.
        every: those whose step is a multiple of it besides; None keeps none besides.
    """

    latest: int | None = None
    every: int | None = None

    def superseded(self, steps: Sequence[int]) -> list[int]:
        """The steps to remove of those that are there."""
        if self.latest is None:
            return []
        older = sorted(steps)[: -self.latest]
        return [step for step in older if not self.every or step % self.every]


@dataclass(kw_only=True)
class Save:
    """A save under way, on one rank.

    Attributes:
        folder: the checkpoint's name to be.
        stopped_seconds: how long the training stood still for it.
        seconds: how long all of it took; 0 while it is under way.
    """

    folder: Path
    stopped_seconds: float = 0.0
    seconds: float = 0.0
    _thread: threading.Thread | None = None
    _failure: Exception | None = None

    @property
    def ended(self) -> bool:
        """Whether ``wait`` would return, or raise what the disk refused, at once.

        False too where it would raise another failure: ranks do not raise that at a step of their
        own.
        """
        alive = self._thread is not None and self._thread.is_alive()
        return not alive and (self._failure is None or isinstance(self._failure, ConfigError))

    def wait(self) -> Path:
        """The checkpoint's folder, complete and on the disk. Called on every rank.

        Raises:
            ConfigError: it exists already, or can not be written; on every rank alike.
            RuntimeError: a rank failed otherwise; on every rank alike, with its traceback.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self.folder


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a rank's thread needs, and nothing that the training changes."""

    target: Path
    facts: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    """On the first rank."""
    image: Tensor | None
    """None where this rank writes nothing."""
    failure: Exception | None
    """Why there is none where there should be one."""
    keep: Keep
    group: Group = field(repr=False)

    @property
    def temporary(self) -> Path:
        """The folder's name until it is complete."""
        return self.target.with_name(self.target.name + TEMPORARY)


def start_save(
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
    keep: Keep | None = None,
    memory: HostMemory | None = None,
    process_group: Group = None,
) -> Save:
    """Begins to write ``folder/step-N``; the model may change on return. Called on every rank.

    Args:
        folder: the run's folder, made when missing; all ranks see the same files.
        step: training steps done.
        consumed: rows of the run used so far.
        model: any module; DTensor parameters (FSDP2, tensor parallel) are stored in parts.
        optimizer: AdamW over parameters of ``model``, or None to store the model alone.
        config, grid, data_fingerprint, vocab_size: go into the manifest.
        extra: plain data that goes there too; the first rank's is kept.
        keep: which older checkpoints stay; by default all.
        memory: to copy to; whoever saves often keeps it. Free again when the save has ended.
        process_group: the ranks that save, by default all; its first rank coordinates. Nothing
            else may use it until the save has ended. Without torch.distributed the process saves
            alone.

    Returns:
        the save; whatever fails, it is told by its ``wait``.
    """
    began = time.perf_counter()
    target = step_folder(Path(folder), step)
    parameters, state = model_state(model)
    state |= optimizer_state(parameters, optimizer)
    save = Save(folder=target)
    try:
        plan, tensors = _plan(target, state, process_group)
    except Exception as error:
        save._failure = error
        return save
    # A rank that could not copy says so with the others' answers, which would wait for it.
    image, failure = attempt(lambda: _copy(plan, state, memory or HostMemory()))
    facts = {
        "version": FORMAT_VERSION,
        "step": step,
        "consumed": consumed,
        "config": asdict(config),
        "data_fingerprint": data_fingerprint,
        "vocab_size": vocab_size,
        "torch_version": torch.__version__,
        "package_version": cp_megatron.__version__,
        "grid": asdict(grid),
        "optimizer_steps": optimizer_steps(parameters, optimizer),
        "extra": extra or {},
    }
    job = _Job(
        target=target,
        facts=facts,
        tensors=tensors,
        image=image,
        failure=failure,
        keep=keep or Keep(),
        group=process_group,
    )
    save._thread = threading.Thread(target=_finish, args=(save, job, began), daemon=True)
    save._thread.start()
    save.stopped_seconds = time.perf_counter() - began
    return save


def _plan(
    target: Path, state: Mapping[str, Tensor], group: Group
) -> tuple[SavePlan, dict[str, TensorEntry]]:
    """What this rank writes, and on the first rank where every tensor will lie.

    The first rank also makes the folder, before any rank writes into it.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def local() -> SavePlan:
        planner.set_up_planner(dict(state), is_coordinator=rank_in(group) == 0)
        return SavePlan(storable(planner.create_local_plan().items))

    plan, failure = attempt(local)
    answers = gathered((plan, failure), group)
    raise_first([error for _, error in answers])
    if rank_in(group):
        merged, failure = from_first(None, group)
        tensors: dict[str, TensorEntry] = {}
    else:
        found, failure = attempt(lambda: _merge(planner, [plan for plan, _ in answers], target))
        failure = None if failure is None else _user_error(failure, target, 0)
        merged, tensors = found or ([], {})
        from_first((merged, failure), group)
    raise_first([failure])
    return merged[rank_in(group)], tensors


def _merge(
    planner: DefaultSavePlanner, plans: list[SavePlan], target: Path
) -> tuple[list[SavePlan], dict[str, TensorEntry]]:
    merged, metadata = planner.create_global_plan(plans)
    _make_folder(target)
    return merged, _tensor_entries(metadata, merged)


def storable(items: Sequence[WriteItem]) -> list[WriteItem]:
    """The items without the empty shards of ranks that hold none of a tensor.

    An empty shard may begin where another rank's begins and would pass for its duplicate.
    """
    for item in items:
        if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
            raise TypeError(f"{item.index.fqn} is not a tensor; a checkpoint holds no pickles")
        if item.tensor_data.properties.dtype not in DTYPE_NAMES:
            dtype = item.tensor_data.properties.dtype
            raise TypeError(f"{item.index.fqn}: a checkpoint can not hold {dtype}")
    return [item for item in items if _sizes(item).numel() > 0]


def _make_folder(target: Path) -> None:
    """Makes an empty ``step-N.tmp``; what an ended process left of others makes room."""
    if os.path.lexists(target):
        rule = f"{target.name} exists already, and nothing is overwritten"
        raise ConfigError(FLAG, target.parent, rule, "another folder")
    for torn in unfinished_steps(target.parent):
        discard(torn)
    target.with_name(target.name + TEMPORARY).mkdir(parents=True)


def _copy(plan: SavePlan, state: Mapping[str, Tensor], memory: HostMemory) -> Tensor | None:
    """The boxes that this rank writes."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(state))
    found: dict[str, Tensor] = {}
    for item in plan.items:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor), item.index.fqn
        found[_key(item)] = data.detach()
    return take_image(found, memory) if found else None


def _finish(save: Save, job: _Job, began: float) -> None:
    """A rank's thread: writes its shard; the first rank completes the checkpoint."""
    try:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        save._failure = _write(job)
    except Exception:  # a peer is gone, say; the training will notice too
        save._failure = RuntimeError(f"checkpoint {job.target}\n{traceback.format_exc()}")
    save.seconds = time.perf_counter() - began


def _write(job: _Job) -> Exception | None:
    """Why the checkpoint could not be written, on every rank alike."""
    entry, failure = attempt(lambda: _write_shard(job))
    answers = gathered((entry, failure), job.group)
    failures = [
        None if error is None else _user_error(error, job.target, rank)
        for rank, (_, error) in enumerate(answers)
    ]
    failure = next((error for error in failures if error is not None), None)
    if rank_in(job.group) == 0:
        if failure is None:
            files = {_file(rank): entry for rank, (entry, _) in enumerate(answers) if entry}
            _, failure = attempt(lambda: _complete(job, files))
            failure = None if failure is None else _user_error(failure, job.target, 0)
        if failure is not None:
            # Half a checkpoint on a full disk would also fill it for the next one.
            shutil.rmtree(job.temporary, ignore_errors=True)
    told: Exception | None = from_first(failure, job.group)
    return told


def _write_shard(job: _Job) -> FileEntry | None:
    if job.failure is not None:
        raise job.failure
    if job.image is None:
        return None
    return write_image(job.temporary / _file(rank_in(job.group)), job.image)


def _complete(job: _Job, files: Mapping[str, FileEntry]) -> None:
    """On the first rank, when every rank has written: the manifest, the name, the older ones."""
    manifest = Manifest(**job.facts, files=files, tensors=job.tensors)
    write_text(job.temporary / MANIFEST, manifest.to_json())
    sync(job.temporary)
    job.temporary.rename(job.target)
    sync(job.target.parent)
    steps = finished_steps(job.target.parent)
    for step in job.keep.superseded(list(steps)):
        # Not by that name any more as soon as a byte of it is gone.
        torn = steps[step].with_name(steps[step].name + TEMPORARY)
        steps[step].rename(torn)
        shutil.rmtree(torn, ignore_errors=True)


def _user_error(error: Exception, target: Path, rank: int) -> Exception:
    """What the disk refused, as a person is told it."""
    if isinstance(error, OSError):
        rule = f"rank {rank}: {error.strerror or error}"
        return ConfigError(FLAG, target, rule, "a disk with room and write access")
    return error


def _tensor_entries(metadata: Metadata, plans: Sequence[SavePlan]) -> dict[str, TensorEntry]:
    places = {
        (item.index.fqn, item.index.offset): (_file(rank), _key(item))
        for rank, plan in enumerate(plans)
        for item in plan.items
    }
    entries = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            file, key = places[name, chunk.offsets]
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            chunks.append(ChunkEntry(offsets=offsets, sizes=sizes, file=file, key=key))
        dtype = DTYPE_NAMES[tensor.properties.dtype]
        shape = tuple(tensor.size)
        entries[name] = TensorEntry(dtype=dtype, shape=shape, chunks=tuple(chunks))
    return entries


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _sizes(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes


def _key(item: WriteItem) -> str:
    """A whole tensor is stored under its own name, so that other programs can read it."""
    assert item.tensor_data is not None
    if _sizes(item) == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, item.tensor_data.chunk.offsets))}"
