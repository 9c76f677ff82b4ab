"""The loop: steps, and around them validation, metrics, checkpoints and the wish to stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cp_megatron.checkpoint.manifest import step_folder
from cp_megatron.checkpoint.store import save_checkpoint
from cp_megatron.data.batch import Batch, microbatches
from cp_megatron.data.sampler import Rows, RowSplits
from cp_megatron.train.metrics import (
    Metrics,
    MetricsWriter,
    flops_per_row,
    peak_flops,
    peak_memory,
)
from cp_megatron.train.optimizer import learning_rate
from cp_megatron.train.preflight import RunPlan
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.signals import StopRequest
from cp_megatron.train.step import StepResult, Trainer


class DivergedError(RuntimeError):
    """The loss or the gradient is not a number; every rank raises it at the same step."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run consists of.

    Attributes:
        plan: what was decided before torch was loaded.
        trainer: the model and what moves it.
        rows: the data.
        data_fingerprint: of the corpus.
        folder: where the run is kept.
        control: a group of all ranks for CPU tensors.
        writer: the metrics, on rank 0 only.
        view: what a person sees.
    """

    plan: RunPlan
    trainer: Trainer
    rows: RowSplits
    data_fingerprint: str
    folder: Path
    control: dist.ProcessGroup
    writer: MetricsWriter | None
    view: ProgressView

    def train(self, start_step: int, stop: StopRequest) -> int:
        """Trains from ``start_step`` to the end or until asked to stop; saves; the last step.

        Raises:
            DivergedError: the loss or the gradient norm is not finite.
        """
        train, data = self.plan.config.train, self.plan.config.data
        batch_tokens = (data.global_batch_size or 0) * data.seq_length
        clock = _Clock(start_step)
        step, saved = start_step, start_step
        while step < train.train_iters:
            rate = learning_rate(step, self.plan.config.optimizer, train.train_iters)
            result = self.trainer.step(self._batches(self.rows.train, step), step=step, lr=rate)
            step += 1
            if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                raise DivergedError(
                    f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; "
                    f"the last checkpoint is of step {saved}"
                )
            stopping = stop.agreed(self.control)
            last = stopping or step == train.train_iters
            valid_loss = None if stopping else self._validate(step)
            if last or step % train.log_interval == 0 or valid_loss is not None:
                self._log(step, result, rate, clock.seconds_per_step(step), batch_tokens, valid_loss)
            self.view.step_done(step)
            interval = self.plan.config.checkpoint.save_interval
            if last or (interval and step % interval == 0):
                self._save(step)
                saved = step
            if stopping:
                break
        return step

    def _batches(self, rows: Rows, number: int) -> list[Batch]:
        """This rank's micro batches of global batch ``number``."""
        data, groups = self.plan.config.data, self.trainer.groups
        size = data.global_batch_size
        assert size is not None, "preflight fills it in"
        return list(
            microbatches(
                rows,
                consumed=number * size,
                global_batch_size=size,
                micro_batch_size=data.micro_batch_size,
                dp_rank=groups.coordinates.dp,
                dp_size=groups.grid.dp,
                document_mask=data.document_mask,
            )
        )

    def _validate(self, step: int) -> float | None:
        """The validation loss where one is due: every ``eval_interval`` steps and at the end."""
        train = self.plan.config.train
        due = step == train.train_iters or (train.eval_interval and step % train.eval_interval == 0)
        if not due or not train.eval_iters or self.rows.valid is None:
            return None
        rows = self.rows.valid
        return self.trainer.evaluate(
            [batch for number in range(train.eval_iters) for batch in self._batches(rows, number)]
        )

    def _log(
        self,
        step: int,
        result: StepResult,
        rate: float,
        seconds: float,
        batch_tokens: int,
        valid_loss: float | None,
    ) -> None:
        device = self.trainer.device
        memory = torch.tensor(peak_memory(device), dtype=torch.int64)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=self.control)
        metrics = Metrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=rate,
            tokens=step * batch_tokens,
            tokens_per_second=batch_tokens / seconds,
            step_seconds=seconds,
            mfu=self._utilisation(batch_tokens, seconds),
            memory_bytes=int(memory.item()),
            valid_loss=valid_loss,
        )
        if self.writer is not None:
            self.writer.write(metrics)
        self.view.log(metrics)

    def _utilisation(self, batch_tokens: int, seconds: float) -> float | None:
        """Model FLOP/s over the peak of all devices, with attention as if no document were masked."""
        peak = peak_flops(self.trainer.device)
        if peak is None:
            return None
        mask = self.trainer.cp.mask
        vocab = self.plan.padded_vocab_size
        row = flops_per_row(self.plan.config.model, padded_vocab_size=vocab, mask=mask)
        flops = row * batch_tokens / mask.seq_len
        return flops / seconds / (peak * self.trainer.groups.grid.world_size)

    def _save(self, step: int) -> None:
        if step_folder(self.folder, step).exists():
            return  # a resumed run that had nothing left to do
        save_checkpoint(
            self.folder,
            step=step,
            consumed=step * (self.plan.config.data.global_batch_size or 0),
            model=self.trainer.model,
            optimizer=self.trainer.optimizer,
            config=self.plan.config,
            grid=self.plan.grid,
            data_fingerprint=self.data_fingerprint,
            vocab_size=self.plan.vocab_size,
            process_group=self.control,
        )


class _Clock:
    """Mean seconds per step since the last time it was asked."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        now = time.perf_counter()
        seconds = (now - self._time) / max(1, step - self._step)
        self._step, self._time = step, now
        return seconds
