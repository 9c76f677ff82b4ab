"""Saves a model and its optimizer's state while training continues.

    training   | plan, copy |  step  |  step  |  step  |
    thread                  | write, hash, fsync | manifest, rename | remove older ones |

Every rank copies the boxes of tensors that ``save_planner`` assigns to it; then training continues.
A thread of every rank writes the copy as a shard. When all shards are on the disk, the first rank
writes the manifest and renames ``step-N.tmp`` to ``step-N``. All ranks learn whether the save
succeeded. The threads communicate over a process group that nothing else uses during the save.
"""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Thread, get_native_id
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import cp_megatron
from cp_megatron.checkpoint.manifest import FileEntry, Manifest
from cp_megatron.checkpoint.object_collectives import (
    Group,
    all_gather_objects,
    attempt,
    on_first_rank,
    raise_first,
    rank_in,
)
from cp_megatron.checkpoint.save_planner import CachedPlan, plan_save, shard_file
from cp_megatron.checkpoint.shard_writer import (
    HostMemory,
    discard,
    sync,
    take_image,
    write_image,
    write_text,
)
from cp_megatron.checkpoint.state_dict import (
    is_optimizers,
    model_state,
    optimizer_state,
    optimizer_steps,
    split_optimizer_name,
)
from cp_megatron.checkpoint.step_folders import (
    MANIFEST,
    finished_steps,
    step_folder,
    temporary_folder,
    unfinished_steps,
)
from cp_megatron.config import Config
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid

FLAG = "--save"
_NICENESS = 19
"""Priority of a thread that writes while training runs, so that training gets the cores first."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which older checkpoints are kept when a new one is complete.

    Attributes:
        latest: the number of newest checkpoints to keep; None keeps all.
        every: also keep checkpoints whose step is a multiple of this.
    """

    latest: int | None = None
    every: int | None = None

    def superseded(self, steps: Sequence[int]) -> list[int]:
        """Returns the steps of ``steps`` that are to be removed."""
        if self.latest is None:
            return []
        older = sorted(steps)[: -self.latest]
        return [step for step in older if not self.every or step % self.every]


@dataclass(kw_only=True)
class SaveCache:
    """The host memory and the plan that one save leaves for the next save of the same ranks."""

    memory: HostMemory = field(default_factory=HostMemory)
    plan: CachedPlan | None = None


class _Shard(NamedTuple):
    """What a rank has written: its file, if it has one, or its failure; and update counts."""

    entry: FileEntry | None
    failure: Exception | None
    counts: Mapping[str, int]


class Save:
    """A save in progress, on one rank.

    Attributes:
        folder: the checkpoint's final name.
        stopped_seconds: how long training was stopped.
        seconds: how long the whole save took; 0 while it is in progress.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, retention: Retention, group: Group
    ) -> None:
        self.folder = folder
        self.stopped_seconds = self.seconds = 0.0
        self._manifest, self._retention, self._group = manifest, retention, group
        self._temporary = temporary_folder(folder)
        self._image: Tensor | None = None  # the contents of this rank's shard, if it has one
        self._counts: Mapping[str, int] = {}  # of updates, those that this rank reports
        self._failure: Exception | None = None
        self._thread: Thread | None = None

    @property
    def ended(self) -> bool:
        """Whether ``wait`` would immediately return or raise ConfigError.

        This is False if ``wait`` would raise another failure, because ranks must not raise that at
        different steps.
        """
        alive = self._thread is not None and self._thread.is_alive()
        return not alive and (self._failure is None or isinstance(self._failure, ConfigError))

    def wait(self) -> Path:
        """Waits until the checkpoint is on the disk, and returns its folder. Every rank calls this.

        Raises:
            ConfigError: the checkpoint exists already or cannot be written; on every rank.
            RuntimeError: a rank failed for another reason; on every rank, with its traceback.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self.folder

    def _start(
        self,
        state: Mapping[str, Tensor],
        counts: Mapping[str, int],
        cache: SaveCache,
        began: float,
        background: bool,
        planning: Group,
    ) -> None:
        """Plans the save, copies this rank's part of the tensors, and starts the thread."""
        try:
            plan = plan_save(state, group=planning, cached=cache.plan, begin=self._make_folder)
        except Exception as error:
            self._failure = error
            return
        cache.plan = plan
        self._manifest = replace(self._manifest, tensors=plan.tensors)
        # One rank reports each, because ranks of several pipeline stages have different ones.
        reported = {split_optimizer_name(name)[0] for name in plan.begun if is_optimizers(name)}
        self._counts = {name: count for name, count in counts.items() if name in reported}

        def copy() -> Tensor | None:
            boxes = plan.boxes(state)
            return take_image(boxes, cache.memory) if boxes else None

        # A rank that cannot copy reports this after writing: the other ranks wait for it there.
        self._image, self._failure = attempt(copy)
        self._thread = Thread(target=self._finish, args=(began, background), daemon=True)
        self._thread.start()
        self.stopped_seconds = time.perf_counter() - began

    def _make_folder(self) -> None:
        """Creates an empty ``step-N.tmp``, and removes those of saves that did not finish."""
        if os.path.lexists(self.folder):
            rule = f"{self.folder.name} exists already, and nothing is overwritten"
            raise ConfigError(FLAG, self.folder.parent, rule, "another folder")
        with self._disk_errors():
            for unfinished in unfinished_steps(self.folder.parent):
                discard(unfinished)
            self._temporary.mkdir(parents=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            rule = f"rank {rank_in(self._group)}: {error.strerror or error}"
            works = "a disk with free space and write access"
            raise ConfigError(FLAG, self.folder, rule, works) from error

    def _finish(self, began: float, background: bool) -> None:
        """Runs in a thread of every rank."""
        try:
            if background and hasattr(os, "setpriority"):
                os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICENESS)
            written = _Shard(*attempt(self._write_shard), self._counts)
            answers = all_gather_objects(written, self._group)
            end = partial(self._complete, answers)
            _, self._failure = attempt(lambda: on_first_rank(end, self._group))
        except Exception:  # for example, another rank has ended; training will notice it too
            self._failure = RuntimeError(f"checkpoint {self.folder}\n{traceback.format_exc()}")
        self.seconds = time.perf_counter() - began

    def _write_shard(self) -> FileEntry | None:
        with self._disk_errors():
            if self._failure is not None:
                raise self._failure
            path = self._temporary / shard_file(rank_in(self._group))
            return None if self._image is None else write_image(path, self._image)

    def _complete(self, shards: Sequence[_Shard]) -> None:
        """Runs on the first rank: writes the manifest, renames the folder, removes older ones."""
        try:
            raise_first([shard.failure for shard in shards])
            files = {shard_file(rank): x.entry for rank, x in enumerate(shards) if x.entry}
            counts = {name: count for shard in shards for name, count in shard.counts.items()}
            manifest = replace(self._manifest, files=files, optimizer_steps=counts)
            with self._disk_errors():
                write_text(self._temporary / MANIFEST, manifest.to_json())
                sync(self._temporary)
                self._temporary.rename(self.folder)
                sync(self.folder.parent)
                steps = finished_steps(self.folder.parent)
                for step in self._retention.superseded(list(steps)):
                    # It loses its name first, so that a step-N is never incomplete.
                    removed = temporary_folder(steps[step])
                    steps[step].rename(removed)
                    shutil.rmtree(removed, ignore_errors=True)
        except Exception:
            # On a full disk, half a checkpoint would leave no space for the next one.
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise


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
    retention: Retention | None = None,
    cache: SaveCache | None = None,
    background: bool = True,
    process_group: Group = None,
    planning_group: Group = None,
) -> Save:
    """Begins to write ``folder/step-N``. Every rank calls this; on return the model may change.

    Args:
        folder: the run's folder, which all ranks share; it is created if it is missing.
        step, consumed, config, grid, data_fingerprint, vocab_size: stored in the manifest.
        model: any module; DTensor parameters (FSDP2, tensor parallelism) are stored in parts. It
            may be one pipeline stage: what any rank has is stored, and once.
        optimizer: AdamW or Muon over parameters of ``model``; None saves only the model.
        extra: other plain data for the manifest, from the first rank.
        retention: which older checkpoints are kept; by default all.
        cache: left by this rank's last save and used by one save at a time; it makes repeated
            saves faster.
        background: whether training continues meanwhile and gets the cores first.
        process_group: the ranks that save, by default all. Nothing else may use the group until
            the save has ended. Without torch.distributed, this process saves alone.
        planning_group: the same ranks, for the messages before this returns; by default
            ``process_group``, which may wait longer for a rank that writes slowly.

    Returns:
        the save in progress; its ``wait`` raises every failure.
    """
    began = time.perf_counter()
    parameters, state = model_state(model)
    state |= optimizer_state(parameters, optimizer)
    manifest = Manifest(
        step=step,
        consumed=consumed,
        config=asdict(config),
        data_fingerprint=data_fingerprint,
        vocab_size=vocab_size,
        torch_version=torch.__version__,
        package_version=cp_megatron.__version__,
        grid=grid.sizes,
        optimizer_steps={},  # of all ranks, when the shards are written
        extra=extra or {},
    )
    target = step_folder(Path(folder), step)
    save = Save(target, manifest, retention or Retention(), process_group)
    counts = optimizer_steps(parameters, optimizer)
    planning = planning_group or process_group
    save._start(state, counts, cache or SaveCache(), began, background, planning)
    return save
