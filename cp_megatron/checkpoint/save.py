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
from torch.optim import Optimizer

import cp_megatron
from cp_megatron.checkpoint.agreement import (
    Group,
    attempt,
    from_first,
    gathered,
    rank_in,
)
from cp_megatron.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TEMPORARY,
    FileEntry,
    Manifest,
    TensorEntry,
    finished_steps,
    step_folder,
    unfinished_steps,
)
from cp_megatron.checkpoint.planning import Part, plan_part, shard_file
from cp_megatron.checkpoint.shard import (
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
_NICENESS = 19
"""Of a thread that writes behind the training: a step that wants the cores goes first."""


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
class Kept:
    """What a save leaves for the next one of the same ranks.

    Attributes:
        memory: that the tensors were copied to.
        part: of the checkpoint, that this rank wrote; used again if the tensors are alike.
    """

    memory: HostMemory = field(default_factory=HostMemory)
    part: Part | None = None


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
    kept: Kept | None = None,
    background: bool = True,
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
        kept: from the last save; whoever saves often has one. Free again when this save has ended.
        background: the training goes on meanwhile, and goes first; False where it waits.
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
    kept = kept or Kept()
    try:
        part = plan_part(
            state, group=process_group, last=kept.part, begin=lambda: _make_folder(target)
        )
    except Exception as error:
        save._failure = error
        return save
    kept.part = part
    # A rank that could not copy says so with the others' answers, which would wait for it.
    image, failure = attempt(lambda: _copy(part, state, kept.memory))
    facts = {
        "version": FORMAT_VERSION,
        "step": step,
        "consumed": consumed,
        "config": asdict(config),
        "data_fingerprint": data_fingerprint,
        "vocab_size": vocab_size,
        "torch_version": torch.__version__,
        "package_version": cp_megatron.__version__,
        "grid": grid.sizes,
        "optimizer_steps": optimizer_steps(parameters, optimizer),
        "extra": extra or {},
    }
    job = _Job(
        target=target,
        facts=facts,
        tensors=part.tensors,
        image=image,
        failure=failure,
        keep=keep or Keep(),
        group=process_group,
    )
    save._thread = threading.Thread(
        target=_finish, args=(save, job, began, background), daemon=True
    )
    save._thread.start()
    save.stopped_seconds = time.perf_counter() - began
    return save


def _make_folder(target: Path) -> None:
    """Makes an empty ``step-N.tmp``; what an ended process left of others makes room."""
    if os.path.lexists(target):
        rule = f"{target.name} exists already, and nothing is overwritten"
        raise ConfigError(FLAG, target.parent, rule, "another folder")
    try:
        for torn in unfinished_steps(target.parent):
            discard(torn)
        target.with_name(target.name + TEMPORARY).mkdir(parents=True)
    except OSError as error:
        raise _user_error(error, target, 0) from error


def _copy(part: Part, state: Mapping[str, Tensor], memory: HostMemory) -> Tensor | None:
    """The boxes that this rank writes, if there are any."""
    boxes = part.boxes(state)
    return take_image(boxes, memory) if boxes else None


def _finish(save: Save, job: _Job, began: float, background: bool) -> None:
    """A rank's thread: writes its shard; the first rank completes the checkpoint."""
    try:
        if background and hasattr(os, "setpriority"):
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
            files = {shard_file(rank): entry for rank, (entry, _) in enumerate(answers) if entry}
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
    return write_image(job.temporary / shard_file(rank_in(job.group)), job.image)


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
