"""When a run is saved, behind the training or not, and what becomes of a save that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cp_megatron.checkpoint.save import Retention, Save, SaveCache, start_save
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.train.step import TrainStep


class Saver:
    """Saves one run, one checkpoint at a time.

    A checkpoint that can not be written (the disk is full) is warned of while the training can go
    on; the older ones stay. The last one has to succeed.

    Args:
        plan: the run.
        folder: where it is kept.
        data_fingerprint: of the corpus.
        group: of all ranks for CPU tensors; asynchronous saves need one of their own.
        say: tells a person a line; on the first rank only.

    Attributes:
        saved: step of the newest checkpoint that is complete, 0 where there is none.
    """

    def __init__(
        self,
        plan: RunPlan,
        *,
        folder: Path,
        data_fingerprint: str,
        group: dist.ProcessGroup,
        say: Callable[[str], None],
    ) -> None:
        self.saved = plan.load_step
        self._plan, self._folder, self._group, self._say = plan, folder, group, say
        self._fingerprint = data_fingerprint
        self._cache = SaveCache()
        self._under_way: tuple[int, Save] | None = None

    def save(
        self,
        step: int,
        train_step: TrainStep,
        *,
        last: bool,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves after ``step``; called on every rank. On return the model may change.

        Args:
            step: steps finished.
            train_step: what is saved.
            last: return when it is on the disk.
            extra: plain data that belongs to it.

        Raises:
            ConfigError: ``last`` and it can not be written.
            RuntimeError: a rank failed otherwise.
        """
        self.settle()
        config = self._plan.config
        waits = last or not config.checkpoint.async_save
        under_way = start_save(
            self._folder,
            step=step,
            consumed=step * (config.data.global_batch_size or 0),
            model=train_step.model,
            optimizer=train_step.optimizer,
            config=config,
            grid=self._plan.grid,
            data_fingerprint=self._fingerprint,
            vocab_size=self._plan.vocab_size,
            extra=extra,
            retention=Retention(
                latest=config.checkpoint.keep_latest_k, every=config.checkpoint.save_retain_interval
            ),
            cache=self._cache,
            background=not waits,
            process_group=self._group,
        )
        self._under_way = step, under_way
        if waits:
            self.settle(last=last)

    def poll(self) -> None:
        """Takes note of a save that has ended meanwhile, so that a person learns of it now."""
        if self._under_way is not None and self._under_way[1].ended:
            self.settle()

    def settle(self, *, last: bool = False) -> None:
        """Waits for the save under way, if there is one; called on every rank.

        Raises:
            ConfigError: ``last`` and it could not be written.
            RuntimeError: a rank failed otherwise.
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
