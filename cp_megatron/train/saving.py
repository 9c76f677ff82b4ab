"""Saves a run, during training or while it waits, and handles saves that fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cp_megatron.checkpoint.save import Retention, Save, SaveCache, start_save
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.run_length import TOKENS
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.train.step import TrainStep

TIMEOUT = timedelta(hours=2)
"""How much longer than the fastest rank the slowest one may take to write a checkpoint."""


class Saver:
    """Saves a run, one checkpoint at a time.

    If a checkpoint cannot be written, for example because the disk is full, training continues with
    a warning, and older checkpoints stay. Only the last checkpoint must succeed.

    Args:
        control: a group of all ranks for CPU tensors.
        say: prints a line; on the first rank only.

    Attributes:
        saved: step of the newest complete checkpoint, 0 if there is none.
    """

    def __init__(
        self,
        plan: RunPlan,
        folder: Path,
        control: dist.ProcessGroup,
        *,
        data_fingerprint: str,
        say: Callable[[str], None],
    ) -> None:
        self.saved = plan.load_step
        group: dist.ProcessGroup | None = control
        if plan.config.checkpoint.async_save:  # it sends messages while ``control`` is in use
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._plan, self._folder, self._group, self._say = plan, folder, group, say
        self._control = control
        self._fingerprint = data_fingerprint
        self._cache = SaveCache()
        self._under_way: tuple[int, Save] | None = None

    def save(
        self, step: int, train_step: TrainStep, *, last: bool, extra: Mapping[str, Any]
    ) -> None:
        """Saves after ``step``. Call it on every rank. When it returns, the model may change.

        Args:
            step: the number of the last finished step.
            last: return only when the checkpoint is on the disk.
            extra: plain data to keep in the checkpoint.

        Raises:
            ConfigError: ``last``, and the checkpoint cannot be written.
            RuntimeError: a rank failed for another reason.
        """
        self.settle()
        config, checkpoint = self._plan.config, self._plan.config.checkpoint
        waits = last or not checkpoint.async_save
        under_way = start_save(
            self._folder,
            step=step,
            consumed=self._plan.rows_of(step).stop,
            model=train_step.model,
            optimizer=train_step.optimizer,
            config=config,
            grid=self._plan.grid,
            data_fingerprint=self._fingerprint,
            vocab_size=self._plan.vocab_size,
            extra={TOKENS: self._plan.tokens_after(step), **extra},
            retention=Retention(
                latest=checkpoint.keep_latest_k, every=checkpoint.save_retain_interval
            ),
            cache=self._cache,
            background=not waits,
            process_group=self._group,
            planning_group=self._control,
        )
        self._under_way = step, under_way
        if waits:
            self.settle(last=last)

    def poll(self) -> None:
        """Reports a save that has ended in the meantime."""
        if self._under_way is not None and self._under_way[1].ended:
            self.settle()

    def settle(self, *, last: bool = False) -> None:
        """Waits for the save in progress, if there is one. Call it on every rank.

        Raises:
            ConfigError: ``last``, and the checkpoint could not be written.
            RuntimeError: a rank failed for another reason.
        """
        if self._under_way is None:
            return
        (step, under_way), self._under_way = self._under_way, None
        try:
            under_way.wait()
        except ConfigError as error:
            if last:
                raise
            kept = f"the newest is of step {self.saved}" if self.saved else "there is none yet"
            self._say(f"warning: no checkpoint of step {step} ({error.rule}); {kept}")
            return
        self.saved = step
